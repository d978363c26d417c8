"""Public contract tests for third-party tasks and techniques, with tiny random models and synthetic rows."""

from tunesmith.testing.contract import (
    CLASSIFYING,
    FAMILIES,
    IMAGE_FAMILIES,
    Case,
    case,
    check,
    sample_row,
    tiny_image_processor,
    tiny_model,
    tiny_tokenizer,
)

__all__ = [
    "CLASSIFYING",
    "FAMILIES",
    "IMAGE_FAMILIES",
    "Case",
    "case",
    "check",
    "sample_row",
    "tiny_image_processor",
    "tiny_model",
    "tiny_tokenizer",
]
