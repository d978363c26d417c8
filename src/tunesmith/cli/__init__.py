"""The command line: `tunesmith VERB ...`."""

from tunesmith.cli.app import main

__all__ = ["main"]
