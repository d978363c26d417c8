"""One run: its story, what it needs first, what it writes down."""
