"""What others reach and what we reach, measured side by side; `bench/README.md` says what each part does.

Run from the repository's root: `python -m bench` for speed, `python -m bench.quality` for how good the answers are.
"""

import os

LOAD = os.getloadavg()[0]
"""Of the last minute, before anything heavy is imported: that alone would take it to a third."""
