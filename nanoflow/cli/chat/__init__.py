"""`nanoflow chat`: a conversation in the terminal."""
