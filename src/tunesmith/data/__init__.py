"""Data pipeline: formats, columns, splits, encoded examples, batches."""
