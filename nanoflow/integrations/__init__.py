"""nanoflow as a part of other programs; each module needs an extra of the package."""
