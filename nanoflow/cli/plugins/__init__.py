"""`nanoflow plugins`: what is installed, and a start for a plugin of your own."""
