"""How good a result is, by recipe."""
