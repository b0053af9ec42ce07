"""Names of modules, many at once: those that differ in the number of their layer are one line.

model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, …  ->  model.layers.{0-31}.mlp.up_proj
"""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


def group_by_layer(
    items: Iterable[T], name_of: Callable[[T], str], key_of: Callable[[T], Hashable] = lambda item: None
) -> list[tuple[str, list[T]]]:
    """`items` whose names differ in their first number only and whose keys are equal, together under one name; in the
    order in which the first of each came."""
    groups: dict[Hashable, list[tuple[int | None, T]]] = {}
    for item in items:
        before, number, after = _split(name_of(item))
        groups.setdefault((before, after, number is None, key_of(item)), []).append((number, item))
    named = []
    for (before, after, *_), members in groups.items():  # type: ignore[misc]
        numbers = [number for number, _ in members if number is not None]
        layers = "" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{{{_ranges(numbers)}}}"
        named.append((f"{before}{layers}{after}", [item for _, item in members]))
    return named


def _split(name: str) -> tuple[str, int | None, str]:
    """What stands before the first part that is a number, the number, and what follows it."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and 0 < index < len(parts) - 1:
            return ".".join(parts[:index]) + ".", int(part), "." + ".".join(parts[index + 1 :])
    return name, None, ""


def _ranges(numbers: Iterable[int]) -> str:
    """ "0-3,7" of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
