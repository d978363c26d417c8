"""One base in memory, several runs that answer from it: `tunesmith.load(base, adapters=["runs/a", "runs/b"])`.

Each run keeps its own modules, which are small; every frozen tensor that runs have in common is held once. Which run
answers is chosen by batch: switching costs nothing, for nothing is moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from tunesmith.deploy import predict
from tunesmith.deploy.predict import Tuned
from tunesmith.errors import UserError, counted, did_you_mean


@dataclass(frozen=True)
class Several:
    """Tuned models over one base, by the names of their runs' folders."""

    runs: Mapping[str, Tuned]

    def __repr__(self) -> str:
        return f"<{counted(len(self.runs), 'run')} over one base: {', '.join(self.runs)}>"

    def predict(
        self,
        inputs: str | Mapping[str, object] | Iterable[str | Mapping[str, object]],
        adapter: str | Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """One answer for each input, by the one run named, or by one run for each input; where there is but one run, it
        need not be named.

        Raises:
            UserError: no such run, or not as many runs as inputs.
        """
        if adapter is None:
            if len(self.runs) > 1:
                raise UserError("which run is to answer?", hint=f"name it after the inputs: {', '.join(self.runs)}")
            (adapter,) = self.runs
        given = [inputs] if isinstance(inputs, str | Mapping) else list(inputs)
        names = [adapter] * len(given) if isinstance(adapter, str) else list(adapter)
        if len(names) != len(given):
            raise UserError(
                f"{counted(len(names), 'adapter')} for {counted(len(given), 'input')}",
                hint="name one, or one for each input",
            )
        if unknown := sorted(set(names) - set(self.runs)):
            raise UserError(f"no adapter is called '{unknown[0]}'", hint=did_you_mean(unknown[0], sorted(self.runs)))
        answers: dict[int, dict[str, Any]] = {}
        for name in dict.fromkeys(names):
            mine = [index for index, one in enumerate(names) if one == name]
            answers |= zip(mine, self.runs[name].predict([given[index] for index in mine]), strict=True)
        return [answers[index] for index in range(len(given))]


@overload
def load(run: str | Path, adapters: None = None, **options: Any) -> Tuned: ...
@overload
def load(run: str | Path, adapters: Sequence[str | Path], **options: Any) -> Several: ...
def load(run: str | Path, adapters: Sequence[str | Path] | None = None, **options: Any) -> Tuned | Several:
    """The model of a run; or, with `adapters`, those of several runs over the base that `run` names.

    Options are those of `deploy.predict.load`.

    Raises:
        UserError: two runs of the same name, or a run that has no adapter.
        RecipeError: there is no finished run in a folder.
        CheckpointError: an adapter is damaged, or belongs to another base.
    """
    if adapters is None:
        return predict.load(run, **options)
    runs: dict[str, Tuned] = {}
    held: dict[tuple[Any, ...], Tensor] = {}
    for adapter in map(Path, adapters):
        if adapter.name in runs:
            raise UserError(f"two adapters are called '{adapter.name}'", hint="rename one of the folders")
        if (adapter / "model").exists() and not (adapter / "adapter").exists():
            hint = "load it on its own with tunesmith.load(run)"
            raise UserError("the run is a whole model, no adapter", where=str(adapter), hint=hint)
        tuned = predict.load(adapter, base=run, **options)
        for name, parameter in tuned.model.named_parameters():
            if not parameter.requires_grad:
                parameter.data = held.setdefault((name, parameter.shape, parameter.dtype), parameter.data)
        runs[adapter.name] = tuned
    return Several(runs)
