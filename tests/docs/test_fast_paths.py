"""docs/fast-paths.md is what docs/fast_paths.py writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "fast_paths.py"


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("fast_paths", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/fast_paths.py"
