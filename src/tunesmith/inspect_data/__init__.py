"""Looks at data before a run does."""
