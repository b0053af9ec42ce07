"""AdapterReport: what a check found of an adapter, for whoever sends it. Arithmetic over the plan; no value is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

from loraplex.lora.module_names import group_by_layer
from loraplex.lora.module_plan import ModulePlan
from loraplex.lora.peft import ALL_LINEAR, PeftConfig
from loraplex.lora.plan import AdapterPlan
from loraplex.lora.weights import ModuleShape, slab_numel

_KINDS = {"linear": "linear", "head": "output head", "embedding": "embedding", "experts": "experts", "leaf": "router"}


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base an adapter was checked on. `fingerprint` None: only its shapes were there, not its weights."""

    model_type: str
    vocab_size: int
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """A module with a LoRA. scaling = alpha / rank, or alpha / sqrt(rank) with rsLoRA. `extras`: what is trained beside
    A and B ("DoRA", "lora_bias", "bias"). `num_values`: numbers in memory."""

    name: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    num_values: int
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OwnParameter:
    """A parameter of the base that the adapter brings its own of. `num_rows`: of so many rows only; None: all of it."""

    name: str
    num_values: int
    num_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """`base_hint`: what adapter_config.json calls its base; a hint, shapes and vocabulary decide. `dtype`: of the file;
    `compute_dtype`: as it is served. Bytes: `disk_bytes` of both files, `ram_bytes` of the slab, `device_bytes` what a
    place on the device adds to that (0 where it shares the RAM tier's memory). `num_matched` of `num_modules` of the
    base's modules that a LoRA can be on have one."""

    base: BaseFacts
    base_hint: str | None
    modules: tuple[AdaptedModule, ...]
    own_parameters: tuple[OwnParameter, ...]
    num_modules: int
    max_rank: int
    alpha: float
    dtype: str
    compute_dtype: str
    disk_bytes: int
    ram_bytes: int
    device_bytes: int
    features: tuple[str, ...]
    ignored: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def num_matched(self) -> int:
        return len(self.modules)

    def to_json(self) -> dict[str, Any]:
        """Modules that differ in their layer only are one entry: {"modules": "model.layers.{0-11}.mlp.up_proj", …}."""
        groups = group_by_layer(self.modules, lambda m: m.name, lambda m: (m.kind, m.rank, m.scaling, m.extras))
        own = group_by_layer(self.own_parameters, lambda p: p.name, lambda p: p.num_rows)
        return {
            "base": {
                "fingerprint": self.base.fingerprint,
                "model_type": self.base.model_type,
                "vocab_size": self.base.vocab_size,
                "hint": self.base_hint,
            },
            "matched": self.num_matched,
            "of_modules": self.num_modules,
            "modules": [
                {
                    "modules": name,
                    "count": len(members),
                    "kind": members[0].kind,
                    "rank": members[0].rank,
                    "alpha": members[0].alpha,
                    "scaling": members[0].scaling,
                    "values": sum(member.num_values for member in members),
                    **({"with": list(members[0].extras)} if members[0].extras else {}),
                }
                for name, members in groups
            ],
            "own_parameters": [
                {
                    "parameters": name,
                    "count": len(members),
                    "values": sum(member.num_values for member in members),
                    **({"rows": members[0].num_rows} if members[0].num_rows is not None else {}),
                }
                for name, members in own
            ],
            "rank": self.max_rank,
            "alpha": self.alpha,
            "dtype": self.dtype,
            "compute_dtype": self.compute_dtype,
            "bytes": {"disk": self.disk_bytes, "ram": self.ram_bytes, "device": self.device_bytes},
            "features": list(self.features),
            "ignored": dict(self.ignored),
            "notes": list(self.notes),
        }


def report_on(
    config: PeftConfig,
    plan: AdapterPlan,
    targets: Mapping[str, ModuleShape],
    base: BaseFacts,
    *,
    dtype: str,
    compute_dtype: str,
    value_bytes: int,
    disk_bytes: int,
    on_device: bool,
    notes: tuple[str, ...] = (),
) -> AdapterReport:
    """The report on an adapter that `plan` made of its files. `value_bytes`: of a number as it is served; `on_device`:
    whether the device has memory of its own; `notes`: further remarks."""
    ram_bytes = plan.numel * value_bytes
    modules = tuple(_module(config, module) for module in plan.modules.values() if module.rank or module.trained_bias)
    own = tuple(
        OwnParameter(f"{one.shape.name}.{one.parameter}", prod(one.stored), None if one.rows is None else len(one.rows))
        for one in plan.replaced
    )
    return AdapterReport(
        base=base,
        base_hint=config.base_model,
        modules=modules,
        own_parameters=own,
        num_modules=sum(1 for shape in targets.values() if shape.kind != "leaf"),
        max_rank=plan.max_rank,
        alpha=config.lora_alpha,
        dtype=dtype,
        compute_dtype=compute_dtype,
        disk_bytes=disk_bytes,
        ram_bytes=ram_bytes,
        device_bytes=ram_bytes if on_device else 0,
        features=_features(config, plan),
        ignored=dict(config.ignored),
        notes=(*plan.notes, *notes),
    )


def _module(config: PeftConfig, module: ModulePlan) -> AdaptedModule:
    shape, rank = module.shape, module.rank
    extras = [label for key, label in (("magnitude", "DoRA"), ("bias", "lora_bias")) if key in module.keys]
    if module.trained_bias is not None:
        extras.append("bias")
    if shape.kind == "leaf":  # folded into a weight of its own
        values = prod(shape.parameters["weight"])
    else:
        values = slab_numel([(shape, rank)]) + module.num_vectors * shape.out_features
    # older checkpoints keep an expert's parts apart, each with the config's rank; in memory they are one
    trained_rank = rank // len(module.experts[0]) if module.experts else rank
    alpha = module.scaling * (sqrt(trained_rank) if config.use_rslora else trained_rank)
    return AdaptedModule(shape.name, _KINDS[shape.kind], rank, round(alpha, 9), module.scaling, values, tuple(extras))


def _features(config: PeftConfig, plan: AdapterPlan) -> tuple[str, ...]:
    """What the adapter uses, in PEFT's words."""
    kinds = {module.shape.kind for module in plan.modules.values() if module.rank}
    used = {
        "rsLoRA": config.use_rslora,
        "DoRA": config.use_dora,
        "lora_bias": config.lora_bias,
        f"bias={config.bias}": config.bias != "none",
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        "target_modules as an expression": isinstance(config.target_modules, str)
        and config.target_modules != ALL_LINEAR,
        "all-linear": config.target_modules == ALL_LINEAR,
        "exclude_modules": bool(config.exclude_modules),
        "layers_to_transform": config.layers_to_transform is not None,
        "target_parameters": bool(config.target_parameters),
        "experts": "experts" in kinds,
        "router": "leaf" in kinds,
        "embedding": "embedding" in kinds,
        "output head": "head" in kinds,
        "modules_to_save": bool(config.modules_to_save),
        "trainable_token_indices": bool(config.token_indices),
        "ensure_weight_tying": config.ensure_weight_tying,
        "fan_in_fan_out": config.fan_in_fan_out,
    }
    return tuple(name for name, is_used in used.items() if is_used)
