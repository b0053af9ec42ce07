"""What a version's record keeps of its proof, as JSON."""

from typing import Any

from loraplex import __version__
from loraplex.engine.build import EngineInfo
from loraplex.engine.proof_result import ModuleFigures, ProofResult
from loraplex.lora.module_names import group_by_layer


def proof_record(result: ProofResult) -> dict[str, Any]:
    """The figures of a proof that passed. Modules that differ in their layer only are one entry with the largest of
    their errors; what was not measured of them is not in it."""
    assert result.failure is None, "only what passed is recorded"
    groups = group_by_layer(
        result.modules, lambda m: m.name, lambda m: (m.kind, m.delta is None, m.product is None, m.own is None)
    )
    divergence = result.divergence
    assert divergence is not None, "a proof that passed has seen an effect"
    return {
        "passed": True,
        "base_fingerprint": result.base_fingerprint,
        "dtype": result.dtype,
        "device": result.device,
        "quantization": result.quantization,
        "loraplex": __version__,
        "tolerance": result.tolerance,
        "largest_error": _rounded(max((module.error for module in result.modules), default=0.0)),
        "modules": [{"modules": name, "count": len(members), **_largest(members)} for name, members in groups],
        "isolation_error": _rounded(result.isolation_error),
        "divergence": {
            "max_difference": _rounded(divergence.max_difference),
            "mean_kl": _rounded(divergence.mean_kl),
            "max_kl": _rounded(divergence.max_kl),
            "changed_tokens": divergence.num_changed,
            "positions": divergence.num_positions,
        },
        "seconds": round(result.seconds, 4),
        "slices": result.num_slices,
    }


def is_proof_for(record: Any, info: EngineInfo) -> bool:
    """Whether a record is of a proof that this release would repeat on this base and come to the same."""
    wanted = {
        "passed": True,
        "base_fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "device": info.device,
        "quantization": None if info.quantization is None else info.quantization.kind,
        "loraplex": __version__,
    }
    return isinstance(record, dict) and all(record.get(key) == value for key, value in wanted.items())


def _largest(members: list[ModuleFigures]) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": members[0].kind}
    for figure, values in (
        ("delta", [member.delta for member in members]),
        ("product", [member.product for member in members]),
        ("own", [member.own for member in members]),
    ):
        known = [value for value in values if value is not None]
        if known:
            found[figure] = _rounded(max(known))
    if "product" in found:
        found["outputs"] = min(member.num_outputs for member in members)
    return found


def _rounded(value: float) -> float:
    """Three digits are enough of an error."""
    return float(f"{value:.3g}")
