"""What main.py can do besides training."""
