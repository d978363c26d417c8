"""Benchmarks of tunesmith against its peers; see `bench/README.md`.

Run from the repository root: `python -m bench` for speed, `python -m bench.quality` for quality.
"""

import os

LOAD = os.getloadavg()[0]
"""Load average of the last minute, read before the heavy imports, which alone would raise it to about 0.3."""
