"""The results of a run in use: artifact, model card, predictions, merging."""
