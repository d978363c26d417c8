"""The task of `mean_color.py`, installed as a third-party package."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith import registry
from tunesmith.testing import sample_row, tiny_image_processor, tiny_model


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    about = tmp_path / "site" / "mean_color-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mean-color\nVersion: 0.1\n", encoding="utf-8")
    (about / "entry_points.txt").write_text("[tunesmith.tasks]\nmean-color = mean_color:MeanColor\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    registry.get.cache_clear()
    yield
    registry.get.cache_clear()
    sys.modules.pop("mean_color", None)


@pytest.fixture
def pictures(installed: None, tmp_path: Path) -> Path:
    """A table of the paths of sixty pictures and their colors."""
    table = tmp_path / "pictures.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label"))
        for number in range(60):
            row = sample_row("mean-color", number)
            path = tmp_path / f"{number:02}.png"
            path.write_bytes(row["image"])  # type: ignore[arg-type]
            writer.writerow((path, row["label"]))
    return table


@pytest.fixture
def tiny_vit(tmp_path: Path) -> Path:
    """A folder with a random ViT of three blocks and its image processor."""
    folder = tmp_path / "tiny-vit"
    tiny_model("vit", "AutoModelForImageClassification").save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return folder
