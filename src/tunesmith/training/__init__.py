"""Training: examples, loop, optimizer, checkpoints, evaluation."""
