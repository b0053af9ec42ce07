"""load_base: a transformers checkpoint as the frozen base."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from loraplex.errors import StartupError
from loraplex.lora.weights import ModuleShape
from loraplex.model.attention import GeometryProbe, LayerGeometry, register_attention
from loraplex.model.lora_layers import BaseLinear
from loraplex.model.quantization import Quantization, keep_exact, quantization_config, stored_nbytes
from loraplex.model.support import check_config
from loraplex.model.targets import base_of, find_targets

_NUM_PROBE_TOKENS = 64


@dataclass(slots=True)
class BaseModel:
    """The frozen base, its linears not wrapped yet.

    model        in eval mode, on `device`, attention set to transformers' own
    targets      the modules that an adapter can change, by name
    fingerprint  of architecture, shapes, vocabulary and a sample of the weights: says whether adapters belong here
    eos_token_ids  of config and generation config (the tokenizer's are added above)
    quantization   what quantising did, of a base that was quantised at load; its fingerprint is the unquantised one's
    """

    model: nn.Module
    config: PretrainedConfig
    targets: dict[str, ModuleShape]
    fingerprint: str
    eos_token_ids: frozenset[int]
    max_position: int | None
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization | None = None

    def tensor_of(self, name: str) -> Tensor:
        """The base's parameter or buffer of this path, its modules wrapped or not. Raises KeyError."""
        path, _, attribute = name.rpartition(".")
        try:
            module = self.model.get_submodule(path)
            if isinstance(module, BaseLinear) and attribute == "weight":
                return module.whole_weight()
            tensor = getattr(base_of(module), attribute)
        except AttributeError:
            raise KeyError(name) from None
        if not isinstance(tensor, Tensor):
            raise KeyError(name)
        return tensor.detach()

    @property
    def weights_fingerprint(self) -> str:
        """Of the very numbers that are computed with: `fingerprint`, and how they were quantised."""
        return self.fingerprint if self.quantization is None else f"{self.quantization.kind}-{self.fingerprint}"

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    @property
    def num_parameters(self) -> int:
        if self.quantization is not None:
            return self.quantization.num_parameters
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def nbytes(self) -> int:
        if self.quantization is not None:
            return self.quantization.nbytes
        return sum(parameter.nbytes for parameter in self.model.parameters())


def load_base(
    path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu", quantization: str | None = None
) -> BaseModel:
    """Load the checkpoint in the folder `path`, quantised by a kind of `quantization.KINDS` if asked for. Raises
    StartupError (or UnsupportedModel by name, before weights are read). No network, no code from the checkpoint."""
    folder = Path(path)
    read_config(folder)
    device = torch.device(device)
    generation = _generation_config(folder)
    if quantization is None:
        return wrap_model(_read_model(folder, dtype), device, generation)
    how = quantization_config(quantization, dtype, device)
    plain = _read_model(folder, dtype)
    facts = (_fingerprint(plain, plain.config), _probe_logits(plain), stored_nbytes(plain))
    num_parameters = sum(parameter.numel() for parameter in plain.parameters())
    del plain
    model = _read_model(folder, dtype, quantization_config=how, device_map=str(device))
    keep_exact(model)
    fingerprint, expected, plain_nbytes = facts
    return wrap_model(
        model,
        device,
        generation,
        fingerprint,
        Quantization(
            kind=quantization,
            plain_nbytes=plain_nbytes,
            nbytes=stored_nbytes(model),
            num_parameters=num_parameters,
            divergence=_relative_difference(_probe_logits(model), expected),
        ),
    )


def _read_model(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StartupError(f"The weights of {folder} cannot be read: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers has drawn them at random
        raise StartupError(
            f"The weights of {folder} lack {len(missing)} tensors that its config asks for, {missing[0]} among them. "
            "Copy the checkpoint again, or give the config.json that belongs to it."
        )
    return model


@torch.inference_mode()
def _probe_logits(model: nn.Module) -> Tensor:
    """Of fixed tokens, float32 on the CPU."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    tokens = torch.arange(_NUM_PROBE_TOKENS).mul(7919).remainder(len(embedding)).unsqueeze(0)
    return model(input_ids=tokens.to(embedding.device), use_cache=False).logits.float().cpu()


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder that can be served, as far as the config tells. Raises StartupError."""
    if not (folder / "config.json").is_file():
        raise StartupError(
            f"{folder} is not a model folder: it has no config.json. Give the folder of a transformers checkpoint "
            "(config.json, *.safetensors, tokenizer files)."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StartupError(f"The config of {folder} cannot be read: {error}") from error
    check_config(config)
    return config


def wrap_model(
    model: nn.Module,
    device: torch.device | str = "cpu",
    generation: GenerationConfig | None = None,
    fingerprint: str | None = None,
    quantization: Quantization | None = None,
) -> BaseModel:
    """A BaseModel around a transformers causal language model that is in memory already; a quantised one is on its
    device already, and its `fingerprint` is the unquantised one's."""
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    model = model.eval().requires_grad_(False)
    if quantization is None:
        check_config(config)
        model = model.to(device)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        # for the model's own forward pass, which the proof at load compares with: the others copy weights or round
        # otherwise; what is served is `LoRAExperts`
        model.set_experts_implementation("eager")  # type: ignore[operator]
    eos = {
        token
        for source in (config, generation)
        for token in _as_list(getattr(source, "eos_token_id", None))
        if token is not None
    }
    return BaseModel(
        model=model,
        config=config,
        targets=find_targets(model),
        fingerprint=fingerprint or _fingerprint(model, config),
        eos_token_ids=frozenset(eos),
        max_position=getattr(config, "max_position_embeddings", None),
        dtype=next(model.parameters()).dtype,
        device=torch.device(device),
        quantization=quantization,
    )


@torch.inference_mode()
def measure_geometry(model: nn.Module) -> dict[int, LayerGeometry]:
    """Run one token through the model with the paged hook looking on: what every layer wants of the cache.

    Leaves the model with the paged attention in place.
    """
    model.set_attn_implementation(register_attention())  # type: ignore[operator]
    probe = GeometryProbe()
    device = next(model.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    model(input_ids=token, position_ids=token, use_cache=False, paged=probe)
    return probe.layers


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def _as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _fingerprint(model: nn.Module, config: PretrainedConfig) -> str:
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in sorted(parameters.items())}
    digest.update(json.dumps([config.model_type, shapes]).encode())
    for _, parameter in sorted(parameters.items()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
