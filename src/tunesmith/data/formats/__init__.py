"""Reads what users have, as it is: recognised by content, row by row, every fault with its place."""
