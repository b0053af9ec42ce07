"""AdapterFacts: what the registry remembers of an adapter besides its digest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """`rank` is the largest of the adapter's modules, `alpha` and `use_rslora` are the config's.

    `target_modules` holds the last parts of the module names ("q_proj"), sorted; `dtype` is the files'
    ("BF16", or "F32+F16" for a mixture); `nbytes` counts config and weights, `num_values`
    the numbers of all A and B: what the slab holds. `text_files` holds the SHA-256 (hexadecimal) of each other file by
    name, `profile` what its serving profile says (None: it has none).
    """

    rank: int
    alpha: float
    use_rslora: bool
    num_modules: int
    target_modules: tuple[str, ...]
    dtype: str
    nbytes: int
    num_values: int
    text_files: Mapping[str, str] = field(default_factory=dict, hash=False)
    profile: Mapping[str, Any] | None = field(default=None, hash=False)
