"""Texts: words, tags, conversations, and what a model reads of them."""
