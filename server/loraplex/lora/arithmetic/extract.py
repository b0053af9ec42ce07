"""extract: base and tuned model -> the adapter that comes closest.

Of every linear (and stack of experts) the difference is cut to a rank by its largest singular values. What differs and
is no linear (norms, embeddings, biases) is named, and on request saved whole beside the LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex.errors import InvalidRequest, StartupError
from loraplex.lora.arithmetic.checkpoint import Checkpoint
from loraplex.lora.arithmetic.draft import Draft, ModuleResult, Tick, no_tick
from loraplex.lora.arithmetic.factors import Factors, Spectrum, spectrum_of_delta
from loraplex.lora.arithmetic.selection import saved_entries, selection
from loraplex.lora.keys import PREFIX
from loraplex.lora.text import shown
from loraplex.lora.weights import ModuleShape


@dataclass(frozen=True, slots=True)
class Difference:
    """A parameter that differs and is in no LoRA. `relative`: ‖tuned - base‖ / ‖base‖."""

    path: str
    relative: float


@dataclass(frozen=True, slots=True)
class Extracted:
    """`num_same`: linears that do not differ and got no LoRA; `saved` and `left`: what else differs."""

    draft: Draft
    num_same: int
    saved: tuple[Difference, ...]
    left: tuple[Difference, ...]


@dataclass(slots=True)
class _Saved:
    """Modules to save whole, and biases; what they came from."""

    modules: list[str] = field(default_factory=list)
    has_biases: bool = False
    found: list[Difference] = field(default_factory=list)


def extract(
    base: Checkpoint, tuned: Checkpoint, rank: int, *, saves: bool = False, name: str = "", tick: Tick = no_tick
) -> Extracted:
    """The adapter of this rank (at most) on `base`, which PEFT and the server will know by `name`. `saves`: write what
    no LoRA can say as saved modules and biases. Raises StartupError for models that are not of one architecture,
    InvalidRequest where no linear differs."""
    _check_alike(base, tuned)
    factors: dict[str, Factors] = {}
    results, num_same = [], 0
    linears = [shape for shape in base.targets.values() if _can_have_lora(shape)]
    for done, shape in enumerate(linears):
        found = _difference(shape, base, tuned, rank)
        if found is None:
            num_same += 1
        else:
            factors[shape.name], result = found
            results.append(result)
        tick(done + 1, len(linears))
    differences = _others(base, tuned, {shape.name for shape in linears})
    saved = _to_save(differences, base) if saves else _Saved()
    if not factors:
        raise InvalidRequest(
            f"No linear of {tuned.folder} differs from {base.folder}, so there is nothing to extract"
            + (f"; what differs is {shown(differences[0].path, 160)}." if differences else ".")
        )
    shapes = {one: base.targets[one] for one in factors}
    fields = {
        **selection(shapes, base.targets),
        "base_model_name_or_path": name or None,
        "fan_in_fan_out": any(shape.transposed and shape.kind != "experts" for shape in shapes.values()),
        "modules_to_save": saved_entries(saved.modules, base.targets) or None,
        "bias": "all" if saved.has_biases else "none",
    }
    draft = Draft(shapes, factors, fields, tuple(results), _tensors(saved, shapes, base, tuned))
    left = tuple(one for one in differences if one not in saved.found)
    return Extracted(draft, num_same, tuple(saved.found), left)


def _check_alike(base: Checkpoint, tuned: Checkpoint) -> None:
    for name, shape in base.targets.items():
        other = tuned.targets.get(name)
        if other is None or _size(other) != _size(shape):
            raise StartupError(
                f"{tuned.folder} is not {base.folder} tuned: {shown(name, 160)} is "
                + ("not in it." if other is None else "of another shape there.")
                + " An adapter needs the base's architecture and vocabulary."
            )
    if more := tuned.targets.keys() - base.targets.keys():
        raise StartupError(f"{tuned.folder} is not {base.folder} tuned: it has {shown(min(more), 160)} besides.")


def _can_have_lora(shape: ModuleShape) -> bool:
    """A head that shares the embedding's weight changes with it, and no LoRA says both."""
    return shape.kind in ("linear", "experts") or (shape.kind == "head" and not shape.is_tied)


def _size(shape: ModuleShape) -> tuple:
    return (shape.num_experts, shape.out_features, shape.in_features, dict(shape.parameters))


def _difference(
    shape: ModuleShape, base: Checkpoint, tuned: Checkpoint, rank: int
) -> tuple[Factors, ModuleResult] | None:
    """The difference of one linear, or of one stack expert by expert; None where there is none."""
    spectra: list[Spectrum | None] = []
    for expert in range(shape.num_experts):
        own, other = base.weight_of(shape, expert), tuned.weight_of(shape, expert)
        same = torch.equal(own, other.to(own.dtype)) and torch.equal(own.to(other.dtype), other)
        spectra.append(None if same else spectrum_of_delta(other.float() - own.float(), rank))
    found = [spectrum for spectrum in spectra if spectrum is not None]
    if not found:
        return None
    new = min(rank, max(spectrum.numerical_rank for spectrum in found))
    total = sum(spectrum.total for spectrum in found)
    energy = sum(spectrum.energy(new) * spectrum.total for spectrum in found) / total
    parts = [_empty(shape, new) if spectrum is None else spectrum.factors(new) for spectrum in spectra]
    factors = parts[0]
    if shape.kind == "experts":
        factors = Factors(torch.stack([part.a for part in parts]), torch.stack([part.b for part in parts]))
    full = min(shape.in_features, shape.out_features)
    return factors, ModuleResult(shape.name, new, full, energy, total**0.5)


def _empty(shape: ModuleShape, rank: int) -> Factors:
    return Factors(torch.zeros(rank, shape.in_features), torch.zeros(shape.out_features, rank))


def _others(base: Checkpoint, tuned: Checkpoint, linears: set[str]) -> list[Difference]:
    """What else differs: parameters of the modules, then whatever the checkpoints hold beside them."""
    paths = []
    for name, shape in base.targets.items():
        is_both_tied = shape.is_tied and tuned.targets[name].is_tied  # the embedding speaks for it
        weights = {"weight"} if name in linears or is_both_tied else set()
        paths += [f"{name}.{parameter}" for parameter in shape.parameters if parameter not in weights]
    known = {base.key_of(path) for path in (*paths, *(f"{name}.weight" for name in base.targets), *base.targets)}
    known |= {place.key for name in linears if base.targets[name].kind == "experts" for place in base.places(name)}
    paths += [path for path in base.paths if base.key_of(path) not in known]
    found = []
    for path in paths:
        try:
            own, other = base.tensor_of(path).float(), tuned.tensor_of(path).float()
        except KeyError:
            continue  # a buffer that one of the two does not keep
        if own.shape == other.shape and not torch.equal(own, other):
            size = float(own.norm())
            found.append(Difference(path, float((other - own).norm()) / size if size else float("inf")))
    return found


def _to_save(differences: list[Difference], base: Checkpoint) -> _Saved:
    """What PEFT can save of them: embedding, head, norms, routers and positions whole, and the linears' biases."""
    saved = _Saved()
    for one in differences:
        name, _, parameter = one.path.rpartition(".")
        shape = base.targets.get(name)
        if shape is None or parameter not in shape.parameters:
            continue
        if parameter == "bias" and shape.kind in ("linear", "head"):
            saved.has_biases = True
        else:
            saved.modules.append(name)
        saved.found.append(one)
    ends = [name for name, shape in base.targets.items() if shape.is_tied or shape.kind == "embedding"]
    if any(base.targets[name].is_tied for name in ends) and any(name in saved.modules for name in ends):
        saved.modules += ends  # a head that shares the embedding's weight goes with it
    saved.modules = list(dict.fromkeys(saved.modules))
    return saved


def _tensors(
    saved: _Saved, shapes: Mapping[str, ModuleShape], base: Checkpoint, tuned: Checkpoint
) -> dict[str, Tensor]:
    """By PEFT's keys: saved modules as they are; with biases, all of them (a bias under LoRA is its base layer's)."""
    tensors = {}
    for name in saved.modules:
        for parameter in base.targets[name].parameters:
            tensors[f"{PREFIX}{name}.{parameter}"] = tuned.tensor_of(f"{name}.{parameter}").clone()
    for name, shape in base.targets.items():
        if saved.has_biases and "bias" in shape.parameters and name not in saved.modules:
            path = f"{name}.base_layer.bias" if name in shapes else f"{name}.bias"
            tensors[PREFIX + path] = tuned.tensor_of(f"{name}.bias").clone()
    return tensors
