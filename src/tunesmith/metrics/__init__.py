"""Scores that are built up batch by batch."""
