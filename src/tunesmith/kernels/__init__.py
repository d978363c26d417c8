"""Fast paths: faster implementations of a model's arithmetic, each checked against the model's own code."""
