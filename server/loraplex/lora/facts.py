"""AdapterFacts: what the registry remembers of an adapter besides its digest."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """`rank` is the largest of the adapter's modules, `alpha` and `use_rslora` are the config's.

    `target_modules` holds the last parts of the module names ("q_proj"), sorted; `dtype` is the files'
    ("BF16", or "F32+F16" for a mixture); `nbytes` counts both files, `num_values`
    the numbers of all A and B: what the slab holds.
    """

    rank: int
    alpha: float
    use_rslora: bool
    num_modules: int
    target_modules: tuple[str, ...]
    dtype: str
    nbytes: int
    num_values: int
