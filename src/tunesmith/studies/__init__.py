"""Studies of several runs, or of a finished one: stages, evaluation, linear probe, demo."""
