"""The proof at load: the real path gives the model's own answers, before the first request is taken.

Two sequences, each prefilled in two chunks and then decoded token by token, interleaved in the same batches through the
paged cache, must equal the model's own forward pass at every position, and the attention hook must have been called by
every attention layer. The same run, compared with each sequence alone, and a probe of the products tell whether rows
are bit-equal whatever else is in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraplex.engine.messages import EngineRequest
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
from loraplex.engine.sequence import Sequence
from loraplex.errors import UnsupportedModel
from loraplex.model.experts import LoRAExperts
from loraplex.model.leaves import ReplaceableLeaf
from loraplex.model.linear import is_row_invariant
from loraplex.model.lora_layers import BaseLinear

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference allowed, as a share of the logits' range."""

NUM_DECODED = 4


@dataclass(frozen=True, slots=True)
class Reference:
    """Token ids of the two sequences and the model's own logits of them, [length, V] each."""

    token_ids: tuple[tuple[int, ...], tuple[int, ...]]
    logits: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class ProofResult:
    """`error`: the largest difference as a share of the logits' range."""

    error: float
    is_batch_invariant: bool


@torch.inference_mode()
def make_reference(model: nn.Module, vocab_size: int, max_length: int = 61) -> Reference:
    """Run the model's own forward pass. Call before its linears are wrapped and its attention is replaced."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    token_ids, logits = [], []
    for length in (max(NUM_DECODED + 2, max_length * 3 // 5), max(NUM_DECODED + 3, max_length)):
        ids = torch.randint(vocab_size, (1, length), generator=generator)
        token_ids.append(tuple(ids[0].tolist()))
        logits.append(model(ids.to(device), use_cache=False).logits[0].float())
    return Reference((token_ids[0], token_ids[1]), (logits[0], logits[1]))


def prove(runner: ModelRunner, reference: Reference) -> ProofResult:
    """Raise UnsupportedModel when the real path differs from `reference`; needs an engine without requests."""
    together, called = _run(runner, reference.token_ids, (0, 1))
    missing = set(runner.cache.layers) - called
    num_layers = getattr(runner.base.config, "num_hidden_layers", len(called))
    if missing or len(called) != num_layers:
        raise UnsupportedModel(
            f"'{runner.base.config.model_type}' computed attention outside the attention hook in "
            f"{num_layers - len(called)} of {num_layers} layers, so its keys and values cannot be paged."
        )
    error = max(_relative_error(together[i], reference.logits[i]) for i in (0, 1))
    tolerance = _TOLERANCE[runner.base.dtype]
    if not error <= tolerance:
        raise UnsupportedModel(
            f"'{runner.base.config.model_type}' failed the proof at load: through the paged cache its logits differ "
            f"from its own forward pass by {error:.2g} of their range (allowed: {tolerance:g})."
        )
    alone = [_run(runner, reference.token_ids, (i,))[0][i] for i in (0, 1)]
    is_same = all(torch.equal(together[i], alone[i]) for i in (0, 1))
    return ProofResult(error, is_same and _products_are_invariant(runner))


def _products_are_invariant(runner: ModelRunner) -> bool:
    """The proof's few rows reach few of the kernels: so the base's products are probed, one of each shape."""
    products: dict[tuple, tuple[Callable[[Tensor], Tensor], int]] = {}
    for module in runner.base.model.modules():
        if isinstance(module, BaseLinear):
            products[module.in_features, module.out_features] = (module.way.product, module.in_features)
        elif isinstance(module, LoRAExperts):
            products |= {("experts", *found): (product, found[0]) for product, found in module.products()}
    for name, shape in runner.targets.items():
        if shape.kind == "leaf" and shape.in_features:
            layer = runner.base.model.get_submodule(name)
            if isinstance(layer, ReplaceableLeaf) and not isinstance(layer.base, nn.Embedding):
                products["router", shape.in_features, shape.out_features] = (layer.product, shape.in_features)
    return all(
        is_row_invariant(product, in_features, runner.base.dtype, runner.base.device)
        for product, in_features in products.values()
    )


def _run(
    runner: ModelRunner, token_ids: tuple[tuple[int, ...], ...], which: tuple[int, ...]
) -> tuple[dict[int, Tensor], set[int]]:
    """Logits [length, V] of the chosen sequences, run side by side, and the layers whose hook was called."""
    seqs = {i: _sequence(i, token_ids[i], runner) for i in which}
    rows: dict[int, list[Tensor]] = {i: [] for i in which}
    called: set[int] = set()
    most = max(1, runner.config.max_num_batched_tokens // len(which))
    step = 0
    while any(seq.num_new_tokens for seq in seqs.values()):
        entries, order = [], []
        for i, seq in seqs.items():
            prefill = len(token_ids[i]) - NUM_DECODED - seq.num_computed_tokens
            # alone: one chunk; together: two chunks of different sizes, then one token a step
            wanted = (prefill if len(which) == 1 else prefill // 2 + 1) if prefill > 0 else 1
            num_new_tokens = min(wanted, most, seq.num_new_tokens)
            if num_new_tokens:
                entries.append(ScheduledSequence(seq, num_new_tokens, ()))
                order.append(i)
        logits, paged, spans = runner.logits(ScheduledBatch(step, tuple(entries), ()))
        if paged is not None:
            called |= paged.called
        for i, entry, span in zip(order, entries, spans, strict=True):
            rows[i].append(logits[span.start : span.end].clone())
            entry.seq.num_computed_tokens += entry.num_new_tokens
        step += 1
    return {i: torch.cat(parts) for i, parts in rows.items()}, called


def _sequence(index: int, token_ids: tuple[int, ...], runner: ModelRunner) -> Sequence:
    seq = Sequence(
        EngineRequest(seq_id=f"proof-{index}", token_ids=token_ids, params=SamplingParams(prompt_logprobs=0)), index
    )
    num_blocks = -(-len(token_ids) // runner.config.block_size)
    seq.block_table = list(range(index * num_blocks, (index + 1) * num_blocks))
    return seq


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    spread = float(expected.max() - expected.min())
    return float((logits - expected).abs().max()) / spread if spread > 0 else float("inf")
