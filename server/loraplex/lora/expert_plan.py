"""LoRA on stacks of experts: as PEFT 0.21 writes it for `target_parameters`, and expert by expert as older checkpoints
keep it.

PEFT wraps a module once for each targeted parameter, in the order of the module's parameters: the first is innermost.
So of n parameters the i-th has its tensors under <module> + ".base_layer" · (n - 1 - i).

Checkpoints of transformers 4 have a LoRA on each expert's own linears, <module>.<e>.gate_proj and so on. What was
concatenated into one parameter makes one LoRA of the sum of the ranks: A one below the other, B block-diagonal
(PEFT's `convert_peft_adapter_state_dict_for_transformers`).
"""

from collections.abc import Mapping

from loraplex.errors import AdapterInvalid
from loraplex.lora.headers import SafetensorsHeader
from loraplex.lora.module_plan import ModulePlan
from loraplex.lora.peft import PeftConfig
from loraplex.lora.rules import ModuleRules
from loraplex.lora.text import shown
from loraplex.lora.weights import ModuleShape

Parts = Mapping[str, Mapping[str, str]]
"""Keys by the file's module path and part."""


def plan_experts(
    config: PeftConfig,
    rules: ModuleRules,
    parts: Parts,
    header: SafetensorsHeader,
    targets: Mapping[str, ModuleShape],
) -> dict[str, ModulePlan]:
    """The experts of the base that the adapter changes, by parameter. Raises AdapterInvalid."""
    stacks: dict[str, list[ModuleShape]] = {}
    for name, shape in targets.items():
        if shape.kind == "experts":
            stacks.setdefault(name.rpartition(".")[0], []).append(shape)
    found: dict[str, ModulePlan] = {}
    for path, shapes in stacks.items():
        targeted = [shape for shape in shapes if rules.selects_parameter(shape.name)]
        for index, shape in enumerate(targeted):
            inner = path + ".base_layer" * (len(targeted) - 1 - index)
            found[shape.name] = _stacked(config, rules, shape, inner, parts.get(inner, {}), header)
        for shape in shapes:
            if shape not in targeted and (module := _by_expert(config, rules, shape, path, parts, header)) is not None:
                found[shape.name] = module
    _check_even(rules, found, targets)
    return found


def expert_names(shape: ModuleShape, tail: str) -> tuple[str, ...]:
    """What an expert's linear `tail` ("3.gate_proj") may be called in a config: an older path first, today's last."""
    return tuple(f"{path.rpartition('.')[0]}.{tail}" for path in (*shape.aliases, shape.name))


def _stacked(
    config: PeftConfig,
    rules: ModuleRules,
    shape: ModuleShape,
    path: str,
    keys: Mapping[str, str],
    header: SafetensorsHeader,
) -> ModulePlan:
    if config.use_dora or config.lora_bias:
        raise _refused(
            f"adapter_config.json names the experts {shown(shape.name, 160)} beside use_dora or lora_bias; PEFT "
            "refuses that too. Train it without."
        )
    if set(keys) != {"A", "B"}:
        raise _refused(
            f"adapter_config.json selects the parameter {shown(shape.name, 160)}, and the file has no lora_A and "
            f"lora_B under {shown(path, 160)}. Send the config and the weights of one save_pretrained."
        )
    rank = rules.rank_of(shape.name)
    total = rank * shape.num_experts
    for part, expected in (("A", (total, shape.in_features)), ("B", (shape.out_features, total))):
        if header.tensors[keys[part]].shape != expected:
            raise _refused(
                f"The tensor {shown(keys[part], 160)} has the shape {list(header.tensors[keys[part]].shape)}; rank "
                f"{rank} on {shape.num_experts} experts of this base needs {list(expected)}. Check r and rank_pattern, "
                "and that the adapter was trained on this base."
            )
    return ModulePlan(shape, rank, rules.scaling_of(shape.name), keys, paths=(path,))


def _by_expert(
    config: PeftConfig,
    rules: ModuleRules,
    shape: ModuleShape,
    path: str,
    parts: Parts,
    header: SafetensorsHeader,
) -> ModulePlan | None:
    paths = [[f"{path}.{expert}.{part}" for part in shape.parts] for expert in range(shape.num_experts)]
    flat = [one for of_expert in paths for one in of_expert]
    names = {one: expert_names(shape, one.removeprefix(f"{path}.")) for one in flat}
    if not any(one in parts for one in flat):
        return None
    if config.use_dora or config.lora_bias or config.use_rslora:
        raise _refused(
            f"The file has a LoRA for each expert of {shown(path, 160)}, from transformers 4, with use_dora, lora_bias "
            "or use_rslora: stacked experts cannot have that, and PEFT would scale it otherwise than in training. "
            "Train it without."
        )
    ranks = {rules.rank_of(*names[one]) for one in flat}
    scalings = {rules.scaling_of(*names[one]) for one in flat}
    if len(ranks) > 1 or len(scalings) > 1:
        raise _refused(
            f"The experts of {shown(path, 160)} have different ranks or alphas, and stacked experts share one. Train "
            "it with one rank for them."
        )
    rank = ranks.pop()
    out_features = shape.out_features // len(shape.parts)
    keys = []
    for of_expert in paths:
        pairs = []
        for one in of_expert:
            own = parts.get(one, {})
            if not any(map(rules.selects, names[one])) or set(own) != {"A", "B"}:
                raise _refused(
                    f"The file has a LoRA for some of the experts' linears of {shown(path, 160)} and none that "
                    f"adapter_config.json selects for {shown(one, 160)}: "
                    f"{' and '.join(shape.parts)} of all {shape.num_experts} experts belong together. Save the adapter "
                    "again."
                )
            for part, expected in (("A", (rank, shape.in_features)), ("B", (out_features, rank))):
                if header.tensors[own[part]].shape != expected:
                    raise _refused(
                        f"The tensor {shown(own[part], 160)} has the shape {list(header.tensors[own[part]].shape)}; "
                        f"rank {rank} on this base needs {list(expected)}. Check r and rank_pattern, and that the "
                        "adapter was trained on this base."
                    )
            pairs.append((own["A"], own["B"]))
        keys.append(tuple(pairs))
    # the scaling stays that of each part: the fused rank and alpha both grow by the number of parts
    return ModulePlan(shape, rank * len(shape.parts), scalings.pop(), experts=tuple(keys), paths=tuple(flat))


def _check_even(rules: ModuleRules, found: Mapping[str, ModulePlan], targets: Mapping[str, ModuleShape]) -> None:
    """A file that has a LoRA for each expert of some layers that the config selects and not of others was cut."""
    separate = {name.rpartition(".")[2] for name, module in found.items() if module.experts}
    for name, shape in targets.items():
        is_missing = shape.kind == "experts" and name.rpartition(".")[2] in separate and name not in found
        if is_missing and shape.parts and any(map(rules.selects, expert_names(shape, f"0.{shape.parts[0]}"))):
            raise _refused(
                f"The file has a LoRA for each expert of some layers, and none for {shown(name, 160)}, which "
                "adapter_config.json selects too. Save the adapter again."
            )


def _refused(message: str) -> AdapterInvalid:
    return AdapterInvalid(message, param="weights")
