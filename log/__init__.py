"""What a run writes: lines, tables, pictures, TensorBoard."""
