"""The recipe tree: `task`, `model`, `data`, `technique`, `train`, `output`.

Each field is a recipe key. Its default and description are what `tunesmith init`, `tunesmith schema` and
docs/recipe.md show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, SerializeAsAny, model_validator

from tunesmith.recipe.fields import Augmentation, LocalPath
from tunesmith.registry import Keys, Plugin

if TYPE_CHECKING:
    from tunesmith.tasks import Task
    from tunesmith.techniques import Technique
else:
    Task = Technique = Plugin  # importing the contracts imports torch, which takes seconds

COMMON_DATA_KEYS = frozenset({"train", "validation", "test", "columns", "limit", "on_bad_row", "group"})
"""Keys of `data` that every task reads; `Task.data_keys` names the others."""

Count = Annotated[int, Field(ge=1)]


class Data(Keys):
    """The data files and how they are read."""

    train: LocalPath | None = Field(None, description="training file, or a folder with train, validation and test")
    validation: LocalPath | float | None = Field(
        0.1, description="file, fraction of train (seeded, stratified by class), or null for none"
    )
    test: LocalPath | float | None = Field(
        None, description="file, fraction of train (seeded, stratified by class), or null for none"
    )
    columns: dict[str, str | int] | None = Field(
        None, description="column name or number for each role, e.g. {text: review}"
    )
    max_length: int | None = Field(
        None, ge=4, description="maximum tokens per text; default: the model's limit, at most 512"
    )
    group: str | None = Field(
        None,
        min_length=1,
        description="column to group by (contract, patient): equal values stay in one split of train",
    )
    limit: int | None = Field(None, ge=1, description="maximum rows read from each file, for trials")
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="on an invalid row, stop with exit code 3, or skip the row and count it"
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None, description="loss weight of each class; balanced: inverse to class frequency"
    )
    augment: list[Augmentation] | None = Field(
        None, description="augmentations of training texts, e.g. [typos, {name: word-dropout, probability: 0.1}]"
    )

    @model_validator(mode="after")
    def _check_fractions(self) -> Self:
        fractions = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if any(not 0 < fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
            given = " and ".join(f"{fraction:g}" for fraction in fractions)
            what = f"validation and test fractions must be above 0 and sum to less than 1 ({given})"
            raise ValueError(f"{what}; e.g. data.validation=0.1")
        return self


class Train(Keys):
    """Training hyperparameters."""

    epochs: float | None = Field(None, gt=0, description="passes over the training data; default: 3")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="examples per optimizer step, over all processes")
    micro_batch_size: Count | Literal["auto"] = Field(
        "auto", description="examples per forward pass; auto: as many as fit in memory"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate; default: depends on technique and model"
    )
    head_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of a new head and of added tokens; default: the technique's"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay; norms and biases are exempt")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="fraction of steps used for learning-rate warmup")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="learning-rate schedule after warmup"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum 0.9")
    max_grad_norm: float | None = Field(1.0, gt=0, description="maximum gradient norm; null: no clipping")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="compute precision; auto: bf16 where the hardware supports it"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of splits, new weights, data order and dropout")
    evaluate_every: Count | Literal["epoch"] = Field("epoch", description="evaluation interval in steps, or epoch")
    save_every: Count | Literal["epoch"] = Field("epoch", description="checkpoint interval in steps, or epoch")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept; the best is kept as well")
    metric: str | None = Field(
        None, description="metric that selects the best checkpoint (ties: lower loss); default: the task's"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after this many evaluations without improvement; null: never"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="recompute activations to save memory; auto: only when memory runs out"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="label smoothing: fraction of each target spread over all classes"
    )
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        "stop", description="on a non-finite loss or gradient: stop, skip the step, or return to the last checkpoint"
    )
    max_skips: int = Field(3, ge=1, description="steps that on_nan may skip before the run stops")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps")
    fast_path: Literal["auto", "off"] = Field(
        "auto", description="auto: faster code with equal results, checked at the start; off: the model's own code"
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps exclude each other; keep one (epochs=null removes the other)")
        return self


class Recipe(Keys):
    """All settings of one run."""

    task: SerializeAsAny[Task] = Field(description="name of a task, or {name: ..., and its keys}")
    model: str = Field(
        min_length=1, description="folder, org/name on the Hub, pypi:name==version, .gguf file, or an earlier run"
    )
    data: Data = Field(description="data files")
    technique: SerializeAsAny[Technique] = Field(
        description="name of a fine-tuning technique, or {name: ..., and its keys}; default: lora"
    )
    train: Train = Field(description="training hyperparameters")
    output: LocalPath = Field(min_length=1, description="run folder; default: runs/DATA-TECHNIQUE")

    _continues: bool = PrivateAttr(False)

    @property
    def continues(self) -> bool:
        """True where training continues the adapter of the run in `model` (`technique: {..., continue: true}`)."""
        return self._continues

    def over(self, model: str, technique: Technique) -> Self:
        """Return the recipe with another model and technique; it does not continue an adapter."""
        changed = self.model_copy(update={"model": model, "technique": technique})
        changed._continues = False
        return changed

    def dump(self) -> dict[str, Any]:
        """Return the tree as plain values, as written to `recipe.yaml`."""
        tree = self.model_dump()
        for kind in ("task", "technique"):
            tree[kind] = {"name": getattr(self, kind).name, **tree[kind]}
        tree["technique"] |= {"continue": True} if self._continues else {}
        return {key: tree[key] for key in ("task", "model", "data", "technique", "train", "output")}


class Gain(Keys):
    """Comparison of the last stage with and without the stages before it."""

    seeds: int = Field(3, ge=2, description="seeds for which the last stage runs with, and without, the earlier stages")
