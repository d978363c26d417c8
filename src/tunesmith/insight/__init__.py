"""Interpretation of a run: report and hints."""
