"""One run: preparation, training, messages, and the files that it writes."""
