"""`nanoflow results`: what a sweep found out, as a table, as CSV and as a plot."""
