"""One file that is whole or absent, and what lies in it."""
