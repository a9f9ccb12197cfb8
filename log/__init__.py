"""The files that a run writes besides checkpoints: lines, tables, pictures, TensorBoard."""
