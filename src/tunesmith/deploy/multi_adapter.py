"""Several adapters that share one base in memory: `tunesmith.load(base, adapters=["runs/a", "runs/b"])`.

Each run has its own modules; frozen tensors that runs have in common are stored once. Each call chooses its run, and
switching costs nothing, because no weights are moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from tunesmith.deploy import predict
from tunesmith.deploy.predict import FineTunedModel
from tunesmith.errors import UserError, counted, did_you_mean


@dataclass(frozen=True)
class MultiAdapterModel:
    """Fine-tuned models that share one base, by the folder names of their runs."""

    runs: Mapping[str, FineTunedModel]

    def __repr__(self) -> str:
        return f"<{counted(len(self.runs), 'run')} with one base: {', '.join(self.runs)}>"

    def predict(
        self,
        inputs: str | Mapping[str, object] | Iterable[str | Mapping[str, object]],
        adapter: str | Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Return one answer for each input. `adapter` names one run for all inputs, or one run for each.

        With a single run, `adapter` may be left out.

        Raises:
            UserError: unknown run, or as many runs as inputs are needed.
        """
        if adapter is None:
            if len(self.runs) > 1:
                raise UserError("adapter: missing", hint=f"name one of {', '.join(self.runs)}")
            (adapter,) = self.runs
        given = [inputs] if isinstance(inputs, str | Mapping) else list(inputs)
        names = [adapter] * len(given) if isinstance(adapter, str) else list(adapter)
        if len(names) != len(given):
            raise UserError(
                f"{counted(len(names), 'adapter')} for {counted(len(given), 'input')}",
                hint="name one adapter, or one for each input",
            )
        if unknown := sorted(set(names) - set(self.runs)):
            raise UserError(f"unknown adapter '{unknown[0]}'", hint=did_you_mean(unknown[0], sorted(self.runs)))
        answers: dict[int, dict[str, Any]] = {}
        for name in dict.fromkeys(names):
            own = [index for index, one in enumerate(names) if one == name]
            answers |= zip(own, self.runs[name].predict([given[index] for index in own]), strict=True)
        return [answers[index] for index in range(len(given))]


@overload
def load(run: str | Path, adapters: None = None, **options: Any) -> FineTunedModel: ...
@overload
def load(run: str | Path, adapters: Sequence[str | Path], **options: Any) -> MultiAdapterModel: ...
def load(
    run: str | Path, adapters: Sequence[str | Path] | None = None, **options: Any
) -> FineTunedModel | MultiAdapterModel:
    """Load the model of a run; or, with `adapters`, several runs with the base that `run` names.

    Options are those of `deploy.predict.load`.

    Raises:
        UserError: two runs have the same name, or a run has no adapter.
        RecipeError: a folder contains no finished run.
        CheckpointError: an adapter is damaged, or was trained on another base.
    """
    if adapters is None:
        return predict.load(run, **options)
    runs: dict[str, FineTunedModel] = {}
    shared: dict[tuple[Any, ...], Tensor] = {}
    for adapter in map(Path, adapters):
        if adapter.name in runs:
            raise UserError(f"two adapters have the name '{adapter.name}'", hint="rename one of the folders")
        if (adapter / "model").exists() and not (adapter / "adapter").exists():
            hint = "load it alone with tunesmith.load(run)"
            raise UserError("the run has a whole model and no adapter", where=str(adapter), hint=hint)
        tuned = predict.load(adapter, base=run, **options)
        for name, parameter in tuned.model.named_parameters():
            if not parameter.requires_grad:
                parameter.data = shared.setdefault((name, parameter.shape, parameter.dtype), parameter.data)
        runs[adapter.name] = tuned
    return MultiAdapterModel(runs)
