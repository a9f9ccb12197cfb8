"""What a run needs while it runs."""
