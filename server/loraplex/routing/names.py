"""The grammar of names (adapters, aliases and the base share one name space).

    name     [A-Za-z0-9][A-Za-z0-9._-]{0,63}
    ref      name | name@version            version: a positive integer without leading zeros

`@ : + , =` never occur in a name: they mean something in the `model` field of a request, see `composition`.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.errors import InvalidName, InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A name and, if it was pinned, a version."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def validate_name(name: str) -> str:
    """Return `name`, or raise InvalidName saying what the grammar wants."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise InvalidName(
            f"{shown!r} is not a valid name. A name starts with a letter or digit, goes on with letters, digits, "
            "'.', '_' or '-', and has at most 64 characters.",
            param="name",
        )
    return name


def parse_model(model: str) -> ModelRef:
    """Read a name or a version. Raises InvalidName, InvalidRequest."""
    if any(sign in model for sign in "+,=:"):
        raise InvalidRequest(
            f"{model[:80]!r} does not name one adapter. Name one, or one version as 'name@3'; where a sum of adapters "
            "can stand, it is written 'sql:0.7+style@2:0.3'.",
            param="model",
            code="invalid_composition",
        )
    name, at, version = model.partition("@")
    if at and not _VERSION.fullmatch(version):
        raise InvalidName(
            f"{version[:20]!r} in the model {model[:80]!r} is not a version. Versions are positive integers: {name}@1.",
            param="model",
        )
    return ModelRef(validate_name(name), int(version) if at else None)


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
