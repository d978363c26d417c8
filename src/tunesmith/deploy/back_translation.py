"""Back-translation: training texts translated into another language and back by two translation runs of the user.

A step of `data.augment` (Sennrich 2016, arXiv 1511.06709; for classification Xie 2020, arXiv 1904.12848). The texts are
translated once and cached, so that every epoch, a resumed run and other processes use the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tunesmith.data.encoded import file_sha256, fingerprint
from tunesmith.deploy import predict
from tunesmith.errors import DataError, RecipeError, counted
from tunesmith.recipe.fields import Augmentation
from tunesmith.storage.files import atomic_write


def back_translate(
    texts: Iterable[str],
    steps: Sequence[Augmentation],
    cache: Path,
    *,
    device: str = "auto",
    offline: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Return text -> back-translation, cached in `cache`; empty if no step of `data.augment` needs it.

    Raises:
        RecipeError: a run is missing, not finished, or not a translation run.
    """
    step = next((one for one in steps if one.runs is not None), None)
    if step is None:
        return {}
    assert step.runs is not None, "the step was chosen by its runs"
    wanted = sorted(set(texts))
    file = cache / f"{fingerprint(wanted, fingerprints(steps))}.json"
    if not file.exists():
        current = wanted
        for run in step.runs:
            model = predict.load(run, device=device, offline=offline)
            if model.task.name != "translation":
                what = f"data.augment: {run} is a run of {model.task.name}, not of translation"
                raise RecipeError(what, hint="name two translation runs, one for each direction")
            say(f"translating {counted(len(current), 'text')} with {run}")
            answers = _translate(model, current)
            current = [answer["translation"] or text for answer, text in zip(answers, current, strict=True)]
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(dict(zip(wanted, current, strict=True)), ensure_ascii=False))
    translations: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return translations


def _translate(model: predict.FineTunedModel, texts: Sequence[str]) -> list[dict[str, str]]:
    """Translate each text; a text without tokens has an empty translation."""
    try:
        return model.predict(texts)
    except DataError:
        return [_translate(model, [text])[0] for text in texts] if len(texts) > 1 else [{"translation": ""}]


def fingerprints(steps: Sequence[Augmentation]) -> list[str]:
    """Return the sha256 of each run's `run.json`.

    Raises:
        RecipeError: a folder contains no run.
    """
    hashes = []
    for run in (run for step in steps for run in step.runs or ()):
        about = Path(run) / "run.json"
        if not about.is_file():
            hint = "train one with `tunesmith train task=translation ...`"
            raise RecipeError(f"data.augment: no run in {run}", hint=hint)
        hashes.append(file_sha256(about))
    return hashes
