"""Files that are either complete or absent, and their content."""
