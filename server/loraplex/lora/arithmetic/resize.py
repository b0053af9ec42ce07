"""resize: the same adapter with smaller ranks, by the largest singular values of each module's delta.

Everything beside A and B stays: DoRA's magnitudes, biases, saved modules, token rows, the choice of modules.
"""

from loraplex.errors import AdapterInvalid, InvalidRequest
from loraplex.lora.arithmetic.draft import Draft, ModuleResult, Tick, no_tick
from loraplex.lora.arithmetic.factors import spectrum_of_factors
from loraplex.lora.arithmetic.source import Source
from loraplex.lora.files import TEXT_FILES
from loraplex.lora.keys import canonical_key
from loraplex.lora.rules import ModuleRules
from loraplex.lora.text import shown


def resize(source: Source, rank: int | None = None, energy: float | None = None, tick: Tick = no_tick) -> Draft:
    """Cut every module to `rank` at most, or to the smallest rank with this share of its squared Frobenius norm.
    Raises InvalidRequest, and AdapterInvalid for what must be merged instead."""
    if (rank is None) == (energy is None):
        raise InvalidRequest("Say where to cut: by rank, or by energy. One of them.")
    if energy is not None and not 0 < energy <= 1:
        raise InvalidRequest(f"energy is {energy:g}, and it is a share above 0, at most 1.")
    _check(source)
    modules = source.modules
    factors, results = {}, []
    for done, (name, module) in enumerate(modules.items()):
        spectrum = spectrum_of_factors(source.factors(name))
        wanted = rank if rank is not None else spectrum.rank_for(energy or 1.0)
        new = min(wanted, module.rank, spectrum.numerical_rank)
        factors[name] = spectrum.factors(new)
        results.append(ModuleResult(name, new, module.rank, spectrum.energy(new), spectrum.total**0.5))
        tick(done + 1, len(modules))
    tensors = {}
    written = {key for module in modules.values() for part in ("A", "B") if (key := module.key_of(part)) is not None}
    biases = {module.keys["bias"]: module.scaling for module in modules.values() if "bias" in module.keys}
    for key in source.tensors:
        if key not in written:
            tensor = source.tensors[key]
            tensors[canonical_key(key)] = biases[key] * tensor.float() if key in biases else tensor
    texts = {file.name: path.read_bytes() for file in TEXT_FILES if (path := source.folder / file.name).is_file()}
    shapes = {name: module.shape for name, module in modules.items()}
    return Draft(shapes, factors, source.document, tuple(results), tensors, texts=texts)


def _check(source: Source) -> None:
    """Two kinds of file do not keep their form when ranks change."""
    instead = "Use 'loraplex merge ADAPTER --rank R --base MODEL', which writes it anew."
    if any(module.experts for module in source.modules.values()):
        raise AdapterInvalid(
            f"{shown(source.folder.name)} has a LoRA for each expert apart, which transformers 5 stacks. {instead}"
        )
    heads = any(module.shape.is_tied for module in source.modules.values())
    if ModuleRules(source.config).ties_lora and (heads or not source.has_base):
        raise AdapterInvalid(
            f"{shown(source.folder.name)} ties the head's LoRA to the embedding's (ensure_weight_tying). {instead}"
        )
