"""merge: a weighted combination of adapters, whatever their ranks, alphas and modules, as one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from loraplex.errors import AdapterInvalid, InvalidRequest
from loraplex.lora.arithmetic.draft import Draft, ModuleResult, Tick, no_tick
from loraplex.lora.arithmetic.factors import Factors, concatenated, spectrum_of_delta, spectrum_of_factors
from loraplex.lora.arithmetic.method import MajoritySign, Method
from loraplex.lora.arithmetic.selection import selected_whole, selection
from loraplex.lora.arithmetic.source import Source
from loraplex.lora.arithmetic.sparsify import combine
from loraplex.lora.files import PROFILE, TEXT_FILES
from loraplex.lora.text import shown
from loraplex.lora.weights import ModuleShape


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """`rank` or `energy` cut the result (see `Spectrum`); without either, methods that must cut take the largest rank
    of the adapters. `density`, the share of values to keep, belongs to the methods that prune, `seed` to those that do
    so at random. Raises InvalidRequest for what does not go together."""

    method: Method = Method.LINEAR
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    majority_sign: MajoritySign = MajoritySign.TOTAL
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise InvalidRequest("rank and energy both say where to cut. Give one of them.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InvalidRequest(f"energy is {self.energy:g}, and it is a share above 0, at most 1.")
        if self.method.is_exact and self.density is not None:
            raise InvalidRequest(f"The method {self.method} prunes nothing. Leave density out, or take ties or dare.")
        if not self.method.is_exact and self.density is None:
            raise InvalidRequest(f"The method {self.method} prunes: say with density which share of values it keeps.")
        if self.density is not None and not 0 < self.density <= 1:
            raise InvalidRequest(f"density is {self.density:g}, and it is a share above 0, at most 1.")


def merge(sources: Sequence[Source], weights: Sequence[float], options: MergeOptions, tick: Tick = no_tick) -> Draft:
    """Σ weight · delta over `sources`, by the options' method. Raises AdapterInvalid for what is no plain delta or of
    another base, InvalidRequest for what does not go together."""
    if len(weights) != len(sources):
        raise InvalidRequest(f"There are {len(sources)} adapters and {len(weights)} weights. Give one for each.")
    for source in sources:
        if source.beyond_deltas:
            raise AdapterInvalid(
                f"{shown(source.folder.name)} has {source.beyond_deltas}, and only deltas can be added up. Bake it "
                "into its base instead, or merge adapters that have LoRA matrices alone."
            )
    shapes = _shapes(sources)
    generator = torch.Generator().manual_seed(options.seed)
    largest = max(source.plan.max_rank for source in sources)
    factors: dict[str, Factors] = {}
    results = []
    for done, (name, shape) in enumerate(shapes.items()):
        chosen = [(source, weight) for source, weight in zip(sources, weights, strict=True) if name in source.modules]
        factors[name], result = _merged(shape, chosen, options, largest, generator)
        results.append(result)
        tick(done + 1, len(shapes))
    targets = sources[0].targets if sources[0].has_base else None
    fields = {
        **selection(shapes, targets, set[str]().union(*map(selected_whole, sources))),
        "base_model_name_or_path": next((s.config.base_model for s in sources if s.config.base_model), None),
        "fan_in_fan_out": any(source.config.fan_in_fan_out for source in sources),
    }
    texts, notes = _texts(sources)
    return Draft(shapes, factors, fields, tuple(results), notes=notes, texts=texts)


def _shapes(sources: Sequence[Source]) -> dict[str, ModuleShape]:
    """The modules that any of them has, in the base's order (without a base, in the first's, then the second's, …)."""
    found: dict[str, ModuleShape] = {}
    for source in sources:
        for name, module in source.modules.items():
            one, other = module.shape, found.setdefault(name, module.shape)
            if (one.in_features, one.out_features, one.kind) != (other.in_features, other.out_features, other.kind):
                raise AdapterInvalid(
                    f"The module {shown(name, 160)} has {other.in_features} inputs and {other.out_features} outputs "
                    f"in one adapter, {one.in_features} and {one.out_features} in {shown(source.folder.name)}: they "
                    "are of different bases. Merge adapters of one base."
                )
    if sources[0].has_base:
        return {name: found[name] for name in sources[0].targets if name in found}
    return found


def _merged(
    shape: ModuleShape,
    chosen: Sequence[tuple[Source, float]],
    options: MergeOptions,
    largest: int,
    generator: Generator,
) -> tuple[Factors, ModuleResult]:
    method, name = options.method, shape.name
    parts = [source.factors(name) for source, _ in chosen]
    weights = [weight for _, weight in chosen]
    before = max(part.rank for part in parts)
    if method.works_on_deltas:
        delta = combine(
            [p.dense() for p in parts], weights, method, _density(options), options.majority_sign, generator
        )
        spectrum = spectrum_of_delta(delta, options.rank or largest)
    else:
        if method.is_exact:
            whole = concatenated([Factors(p.a, weight * p.b) for p, weight in zip(parts, weights, strict=True)])
        else:
            whole = _matrix_by_matrix(shape, chosen, options, generator)
        if options.rank is None and options.energy is None and method not in (Method.LINEAR, Method.SVD):
            return whole, ModuleResult(name, whole.rank, before, 1.0, spectrum_of_factors(whole).total ** 0.5)
        spectrum = spectrum_of_factors(whole)
    rank = spectrum.numerical_rank
    if options.energy is not None:
        rank = min(rank, spectrum.rank_for(options.energy))
    elif options.rank is not None or method.cuts:
        rank = min(rank, options.rank or largest)
    return spectrum.factors(rank), ModuleResult(name, rank, before, spectrum.energy(rank), spectrum.total**0.5)


def _matrix_by_matrix(
    shape: ModuleShape, chosen: Sequence[tuple[Source, float]], options: MergeOptions, generator: Generator
) -> Factors:
    """PEFT's `_generalized_task_arithmetic_weighted_adapter`: A and B apart, each times sqrt(|weight · scaling|), the
    sign on A's side."""
    modules = [source.plan.modules[shape.name] for source, _ in chosen]
    if len({module.rank for module in modules}) > 1:
        ranks = ", ".join(f"{source.folder.name}: {source.plan.modules[shape.name].rank}" for source, _ in chosen)
        raise InvalidRequest(
            f"The method {options.method} goes through A and B number by number, and {shown(shape.name, 160)} has "
            f"different ranks ({ranks}). Take {_on_deltas(options.method)}, which goes through the deltas."
        )
    factors = [weight * module.scaling for (_, weight), module in zip(chosen, modules, strict=True)]
    roots = [abs(factor) ** 0.5 for factor in factors]
    signed = [root if factor >= 0 else -root for factor, root in zip(factors, roots, strict=True)]
    matrices = [source.matrices(shape.name) for source, _ in chosen]
    density, sign = _density(options), options.majority_sign
    a = combine([a for a, _ in matrices], signed, options.method, density, sign, generator)
    b = combine([b for _, b in matrices], roots, options.method, density, sign, generator)
    return Factors(a, b)


def _density(options: MergeOptions) -> float:
    assert options.density is not None, "checked with the options"
    return options.density


def _on_deltas(method: Method) -> str:
    return "dare_linear_svd" if method is Method.DARE else f"{method}_svd"


def _texts(sources: Sequence[Source]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The text files that all adapters have alike; what is left out is said."""
    texts, notes = {}, []
    for file in TEXT_FILES:
        paths = [source.folder / file.name for source in sources]
        contents = [path.read_bytes() if path.is_file() else None for path in paths]
        if contents[0] is not None and all(content == contents[0] for content in contents):
            texts[file.name] = contents[0]
        elif any(content is not None for content in contents):
            what = "serving profile" if file is PROFILE else "file"
            notes.append(f"left out the {what} {file.name}, which is not the same in all adapters")
    return texts, tuple(notes)
