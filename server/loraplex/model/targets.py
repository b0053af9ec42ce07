"""Targets: the modules of a base that an adapter can change, and the layers that take their places."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D

from loraplex.lora.weights import ModuleShape
from loraplex.model.experts import LoRAExperts, expert_parameters
from loraplex.model.fused import GatedMLP, is_gated_mlp
from loraplex.model.groups import GroupProduct, Member, find_groups
from loraplex.model.leaves import ReplaceableLeaf, find_leaves
from loraplex.model.linear import is_packed
from loraplex.model.lora_layers import (
    BaseLinear,
    Extras,
    GroupDeltas,
    LoRAEmbedding,
    LoRAHead,
    LoRALinear,
    let_go_of_weight,
    sizes_of,
    weight_and_bias,
)
from loraplex.model.quantization import is_quantized
from loraplex.model.step_context import StepContext
from loraplex.ops import ModulePool, Ops

# Exactly these: a subclass (a router, say) may answer something else than x·Wᵀ + b.
_LINEARS = (nn.Linear, Conv1D)
_PLAIN_PATTERN = re.compile(r"[A-Za-z0-9_.]+")


def find_targets(model: nn.Module) -> dict[str, ModuleShape]:
    """Every module of a causal language model that an adapter can change, by name. Runs the model over a few tokens."""
    targets = linear_targets(model)
    for names in find_groups(model, [name for name, shape in targets.items() if shape.kind == "linear"]):
        targets |= {name: replace(targets[name], group=names[0]) for name in names}
    history = _History(model)
    for name, module in model.named_modules():
        for parameter in expert_parameters(module):
            targets[f"{name}.{parameter}"] = _experts(name, parameter, module, history)
    experts = {name.rpartition(".")[0] for name, shape in targets.items() if shape.kind == "experts"}
    for name, axes in find_leaves(model, targets.keys() | experts).items():
        module = model.get_submodule(name)
        parameters = _parameters(module)
        weight = parameters.get("weight", ())
        out_features, in_features = weight if len(weight) == 2 else (0, 0)
        aliases = history.aliases(name)
        targets[name] = ModuleShape(
            name, in_features, out_features, "leaf", parameters=parameters, aliases=aliases, token_axes=axes
        )
    return targets


def linear_targets(model: nn.Module) -> dict[str, ModuleShape]:
    """Those that PEFT's `target_modules` can name: every Linear (quantised or not) and Conv1D, the input embedding and
    the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    targets = {}
    for name, module in model.named_modules():
        parameters = _parameters(module)
        if type(module) in _LINEARS or is_quantized(module):
            out_features, in_features = sizes_of(module)
            if is_quantized(module):
                parameters["weight"] = (out_features, in_features)
            targets[name] = ModuleShape(
                name,
                in_features,
                out_features,
                "head" if module is head else "linear",
                parameters=parameters,
                transposed=isinstance(module, Conv1D),
                is_tied=module is head and embedding is not None and module.weight is embedding.weight,
            )
        elif module is embedding and isinstance(module, nn.Embedding):
            scale = float(getattr(module, "embed_scale", 1.0))
            sizes = (module.num_embeddings, module.embedding_dim)
            targets[name] = ModuleShape(name, *sizes, "embedding", scale, parameters)
    return targets


def wrap_modules(
    model: nn.Module,
    targets: Mapping[str, ModuleShape],
    pools: Mapping[str, ModulePool],
    extras: Mapping[str, Extras],
    context: StepContext,
    ops: Ops,
) -> None:
    """Replace every target by its layer, in place; all linears are targets."""
    gated = [name for name, module in model.named_modules() if is_gated_mlp(module, ops)]
    groups = _group_products(model, targets)
    if hasattr(ops, "add_lora_group"):
        _adapt_groups(groups, pools, context, ops)
    for name, shape in targets.items():
        path = name.rpartition(".")[0] if shape.kind == "experts" else name
        module = model.get_submodule(path)
        match shape.kind:
            case "embedding":
                assert isinstance(module, nn.Embedding)
                layer = LoRAEmbedding(module, shape.output_scale, pools[name], extras[name], context, ops)
            case "experts":
                if isinstance(module, LoRAExperts):  # it has two parameters
                    continue
                own = {parameter: pools[f"{path}.{parameter}"] for parameter in expert_parameters(module)}
                layer = LoRAExperts(module, own, context, ops)
            case "leaf":
                layer = ReplaceableLeaf(module, shape.token_axes, extras[name], context, ops)
            case "head":
                layer = LoRAHead(module, pools[name], extras[name], context, ops)
            case "linear":
                layer = LoRALinear(module, pools[name], extras[name], context, ops, groups.get(name))
        _put(model, path, layer)
    for name in gated:
        _put(model, name, GatedMLP(model.get_submodule(name), ops))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _group_products(model: nn.Module, targets: Mapping[str, ModuleShape]) -> dict[str, Member]:
    """Of every linear that has a group, its part in it; the parts of a group in its order. On a GPU, and where products
    are on packed copies: elsewhere a group would be a copy of its weights for nothing."""
    groups: dict[str, list[str]] = {}
    for name, shape in targets.items():
        if shape.group and _can_be_grouped(model.get_submodule(name)):
            groups.setdefault(shape.group, []).append(name)
    found: dict[str, Member] = {}
    for names in groups.values():
        modules = [model.get_submodule(name) for name in names]
        weights, biases = zip(*map(weight_and_bias, modules), strict=True)
        product = GroupProduct(weights, biases)
        del weights
        for module in modules:
            let_go_of_weight(module)
        found |= {name: Member(product, index) for index, name in enumerate(names)}
    return found


def _adapt_groups(
    groups: Mapping[str, Member], pools: Mapping[str, ModulePool], context: StepContext, ops: Ops
) -> None:
    """Let each group add the deltas of all its linears, where their pools have tables."""
    members: dict[int, list[ModulePool]] = {}
    for name, member in groups.items():
        members.setdefault(id(member.group), []).append(pools[name])
    for member in groups.values():
        own = members[id(member.group)]
        if member.group.adapt is None and all(pool.table is not None for pool in own):
            member.group.adapt = GroupDeltas(own, context, ops)


def _can_be_grouped(module: nn.Module) -> bool:
    if is_quantized(module):
        return False
    weight, _ = weight_and_bias(module)
    return is_packed(weight) or weight.is_cuda


def base_of(module: nn.Module) -> nn.Module:
    """The base's own module, wrapped or not."""
    return module.base if isinstance(module, BaseLinear | LoRAEmbedding | LoRAExperts | ReplaceableLeaf) else module  # type: ignore[return-value]


def _parameters(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def _experts(path: str, parameter: str, module: nn.Module, history: "_History") -> ModuleShape:
    weight: torch.Tensor = getattr(module, parameter)
    num_experts, out_features, in_features = weight.shape
    if module.is_transposed:
        out_features, in_features = in_features, out_features
    name = f"{path}.{parameter}"
    return ModuleShape(
        name,
        in_features,
        out_features,
        "experts",
        transposed=bool(module.is_transposed),
        num_experts=num_experts,
        parts=history.parts(name),
        aliases=history.aliases(name),
    )


class _History:
    """What an architecture's modules were called in checkpoints of transformers 4, by transformers' own mapping."""

    def __init__(self, model: nn.Module):
        mapping = get_checkpoint_conversion_mapping(getattr(getattr(model, "config", None), "model_type", "")) or []
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamings = [
            (old, new)
            for entry in mapping
            if isinstance(entry, WeightRenaming) and not isinstance(entry, WeightConverter)
            for old, new in zip(entry.source_patterns, entry.target_patterns, strict=False)
            if _PLAIN_PATTERN.fullmatch(old) and _PLAIN_PATTERN.fullmatch(new)
        ]

    def parts(self, name: str) -> tuple[str, ...]:
        """The linears of each expert that were stacked (and concatenated along the outputs) into this parameter:
        "mlp.experts.*.gate_proj.weight" was gate_proj."""
        for converter in self._converters:
            kinds = [type(operation).__name__ for operation in converter.operations]
            if len(converter.target_patterns) == 1 and name.endswith(converter.target_patterns[0].lstrip(".")):
                sources = [re.fullmatch(r".*\.\*\.(\w+)\.weight", source) for source in converter.source_patterns]
                if kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and all(sources):
                    return tuple(source[1] for source in sources if source is not None)
        return ()

    def aliases(self, name: str) -> tuple[str, ...]:
        return tuple(name.replace(new, old, 1) for old, new in self._renamings if new in name)
