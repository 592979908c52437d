"""`nanoflow bench`: how fast an engine is, and how near to what the device allows."""
