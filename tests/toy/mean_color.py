"""Third-party task on images: classify an image by its mean color."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.columns import Column
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.formats import Row
from tunesmith.data.preview import Preview
from tunesmith.recipe import Data
from tunesmith.tasks import Answer, Baseline, BoundTask, Metrics, Task
from tunesmith.tasks._labels import LabelObjective, head_config, mistake, render

COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


class MeanColor(Task):
    """Classify an image by its mean color."""

    classes: list[str] | None = Field(None, description="names of the colors; default: from train")

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    processor: ClassVar[Any] = "image_processor"
    unit: ClassVar[str] = "pixels"

    @property
    def columns(self) -> Sequence[Column]:
        return (Column("image", "image", ("picture", "file")), Column("label", "label", ("color",), target=True))

    def parse_target(self, row: Row) -> str:
        return str(row.values["label"])

    def fit(self, targets: Sequence[str], data: Data) -> tuple[Self, Data]:
        return self.model_copy(update={"classes": self.classes or sorted(set(targets))}), data

    def strata(self, targets: Sequence[str]) -> list[int] | None:
        names = sorted(set(targets))
        return [names.index(target) for target in targets]

    def head_config(self) -> dict[str, Any]:
        return head_config("single", self.classes)

    def sample_row(self, number: int) -> dict[str, object]:
        name = list(COLORS)[number % 3]
        return {"image": png(COLORS[name], 16 + number % 5, number), "label": name}

    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        objective = LabelObjective("single", self.classes, label_smoothing=label_smoothing)
        return BoundMeanColor(self, processor, config, data, label_smoothing, objective=objective)

    def render(self, answer: Answer, row: Row) -> str:
        return render(answer)

    def mistake(self, answer: Answer, target: str) -> tuple[str, str, float] | None:
        return mistake(answer, target)


@dataclass(frozen=True, eq=False)
class BoundMeanColor(BoundTask):
    """Mean color with an image processor."""

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        images = [picture(row.values["image"]) for row in rows]
        sizes = self.processor.size["height"], self.processor.size["width"]
        pixels = [np.asarray(image.resize(sizes[::-1]), dtype=np.uint8) for image in images]
        labels = [self.objective.fields(row.values["label"]) if "label" in row.values else {} for row in rows]
        return [{"pixels": one} | label for one, label in zip(pixels, labels, strict=True)]

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        height, width, _ = encoded.fields["pixels"].shape
        return np.full(len(encoded), height * width)

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        pixels = batch.tensor("pixels")
        mean, std = (
            pixels.new_tensor(x, dtype=torch.float32) for x in (self.processor.image_mean, self.processor.image_std)
        )
        return [{"pixel_values": ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)}]

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        return self.objective.normalizers(batch)  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        return self.objective.loss(self.outputs(model, batch), batch, normalizers)  # type: ignore[no-any-return]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        (inputs,) = self.model_inputs(batch)
        return model(**inputs).logits.float()  # type: ignore[no-any-return]

    def metrics(self) -> Metrics:
        return self.objective.metrics()  # type: ignore[no-any-return]

    def baseline(self, train: Encoded) -> Baseline:
        return self.objective.baseline(train)  # type: ignore[no-any-return]

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        return self.objective.answers(self.outputs(model, batch) if outputs is None else outputs)  # type: ignore[no-any-return]

    def preview(self, fields: Fields) -> Preview:
        height, width, _ = fields["pixels"].shape
        return Preview(target=self.objective.shown(fields), lines=[f"picture of {width} x {height} pixels"])


def picture(value: object) -> Image.Image:
    """A picture from its bytes or its path."""
    return Image.open(io.BytesIO(value) if isinstance(value, bytes) else str(value)).convert("RGB")


def png(color: tuple[int, int, int], size: int, seed: int) -> bytes:
    """A picture of one color with noise, as PNG."""
    noise = np.random.default_rng(seed).integers(-25, 26, (size, size, 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(color) + noise).clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
