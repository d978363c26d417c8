"""Public tests for third parties: tiny random models, made-up rows, and the contract of a technique or a task."""

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
