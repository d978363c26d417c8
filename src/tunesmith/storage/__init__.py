"""Files that are whole or absent, run folders and their locks."""
