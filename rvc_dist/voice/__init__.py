"""Voice files and conversion."""
