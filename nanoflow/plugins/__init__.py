"""Built-in plugins, one package a role. Each package's `__init__` holds its hook and imports nothing heavy."""
