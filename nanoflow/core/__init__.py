"""The engine. It knows no plugin: everything swappable reaches it through `registry.Registry`."""
