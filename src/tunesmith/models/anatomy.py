"""The map of a model's parts: what makes a technique work on every model."""
