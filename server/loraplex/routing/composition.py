"""What a `model` field can name: one adapter, or a sum of adapters with scales.

    model   part ("+" part)*          "sql", "sql@3", "sql:0.7", "sql:0.7+style@2:0.3"
    part    name | name@version | either with ":" scale

A scale is a decimal number, at most MAX_SCALE in size; without one it is 1. Scale 0 takes the adapter out of the sum.
"""

import math
import re
from dataclasses import dataclass

from loraplex.errors import InvalidRequest
from loraplex.routing.names import ModelRef, parse_model

MAX_PARTS = 16
MAX_SCALE = 100.0
_SCALE = re.compile(r"-?[0-9]{1,3}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of a sum."""

    ref: ModelRef
    scale: float = 1.0

    def __str__(self) -> str:
        return scaled(str(self.ref), self.scale)


def parse_composition(model: str) -> tuple[Part, ...]:
    """Read a `model` field; one part without a scale is what most requests name. Raises InvalidName, InvalidRequest."""
    texts = model.split("+")
    if len(texts) > MAX_PARTS:
        raise _invalid(model, f"it sums {len(texts)} adapters, and at most {MAX_PARTS} can be")
    return tuple(_part(model, text) for text in texts)


def _part(model: str, text: str) -> Part:
    ref, colon, scale = text.partition(":")
    if not colon:
        return Part(parse_model(ref))
    if not _SCALE.fullmatch(scale) or abs(float(scale)) > MAX_SCALE:
        raise _invalid(model, f"{scale[:20]!r} is no decimal number from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return Part(parse_model(ref), float(scale))


def _invalid(model: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The model {model[:80]!r} is no composition: {why}. Write it as 'sql:0.7+style@2:0.3'.",
        param="model",
        code="invalid_composition",
    )


def scaled(name: str, scale: float) -> str:
    """`name` with its scale, as `parse_composition` reads it; without it when it is 1."""
    assert math.isfinite(scale)
    return name if scale == 1.0 else f"{name}:{scale:.9f}".rstrip("0").rstrip(".")
