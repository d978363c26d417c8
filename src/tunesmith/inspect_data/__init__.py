"""Inspection of data before a run: check, show, convert."""
