"""Model sources, loading, and the anatomy of a model."""
