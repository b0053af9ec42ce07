"""Probe: one forward pass over a few fixed tokens, with an adapter and without, cut into slices between steps.

    rows    | base: fixed tokens | adapter: its tokens | base: its tokens |

The first are the witnesses of isolation, the last what the adapter is compared with. Its tokens are the fixed ones and
those whose rows of the embedding it changes most. All stand in blocks and a place of their own, which no request uses.

A slice is one decoder layer: the pass runs from the start, the layers done before answer what they answered last time,
and it ends after the next one. So other steps can run in between, on the same thread, and no layer is computed twice.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loraplex.engine.batch import BatchBuffers
from loraplex.engine.messages import AdapterUse, EngineRequest
from loraplex.engine.runner import NUM_PROBE_TOKENS, ModelRunner
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
from loraplex.engine.sequence import Sequence as TokenSequence
from loraplex.lora.weights import LoRAWeights, ModuleShape

T = TypeVar("T")
_NUM_OWN_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Observed:
    """What went into a module and came out of it, the adapter's rows only; `x` and the parts of `y` have a leaf's token
    axes, a linear's are [n, features]."""

    x: Tensor
    y: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class ProbeLogits:
    """float32 [n, V] each."""

    witness: Tensor
    adapter: Tensor
    base: Tensor


class Probe:
    def __init__(self, runner: ModelRunner):
        self._runner = runner
        sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 3 * NUM_PROBE_TOKENS}
        self._buffers = BatchBuffers(replace(runner.config, **sizes), runner.base.device)
        self._layers = decoder_layers(runner.base.model)
        self._fixed = _fixed_tokens(runner.base.vocab_size)
        self._witness: Tensor | None = None

    def witness(self) -> Tensor:
        """Logits [n, V] of the fixed tokens without any adapter. The first call runs the pass twice, whole and sliced:
        a model that gives other logits in slices is not cut."""
        if self._witness is None:
            layers, self._layers = self._layers, []
            whole = _run_through(self.run(None)).witness
            if layers and torch.equal(self._sliced_witness(layers), whole):
                self._layers = layers
            self._witness = whole
        return self._witness

    def _sliced_witness(self, layers: list[nn.Module]) -> Tensor:
        """The same, cut at `layers`; empty where they are no layers that run once, one after the other."""
        self._layers = layers
        try:
            return _run_through(self.run(None)).witness
        except _NotLayers:
            return torch.empty(0, device=self._runner.base.device)
        finally:
            self._layers = []

    @torch.inference_mode()
    def run(
        self, weights: LoRAWeights | None, observe: Callable[[str, Observed], None] = lambda name, observed: None
    ) -> Generator[None, None, ProbeLogits]:
        """One pass, with the adapter that stands in the runner's probe place or with none; yields after every slice.
        `observe` is called for each of its modules that runs."""
        runner = self._runner
        tokens = self._fixed if weights is None else self._tokens_of(weights)
        use = () if weights is None else (AdapterUse(weights.digest, weights.nbytes),)
        places = () if weights is None else (runner.probe_place,)
        entries = (
            self._entry(0, self._fixed, (), ()),
            self._entry(1, tokens, use, places),
            self._entry(2, tokens, (), ()),
        )
        batch = self._buffers.build(ScheduledBatch(0, entries, ()), runner.pool)
        names = [] if weights is None else [*dict.fromkeys([*weights.modules, *weights.replaced])]
        start = len(self._fixed)
        rows = {"head": slice(batch.rows[1].start, batch.rows[1].end)}
        watch = _Watch(runner, names, rows, slice(start, start + len(tokens)), observe)
        logits, _ = yield from _in_slices(lambda: runner.forward(batch), self._layers, watch.watching)
        witness, adapter, base = (logits[span.start : span.end].clone() for span in batch.rows)
        return ProbeLogits(witness, adapter, base)

    def _entry(self, index: int, token_ids: tuple[int, ...], use: tuple, places: tuple) -> ScheduledSequence:
        params = SamplingParams(prompt_logprobs=0)  # logits at every position
        seq = TokenSequence(
            EngineRequest(seq_id=f"probe-{index}", token_ids=token_ids, params=params, composition=use), index
        )
        seq.block_table = list(self._runner.probe_blocks[index])
        return ScheduledSequence(seq, len(token_ids), places)

    def _tokens_of(self, weights: LoRAWeights) -> tuple[int, ...]:
        """The fixed tokens, the last of them exchanged for some whose rows the adapter changes."""
        own: list[int] = []
        for name in [*weights.replaced, *weights.modules]:
            shape = self._runner.targets[name]
            extra = weights.extra(shape)
            if extra is not None and extra.rows is not None:
                own += extra.rows[:_NUM_OWN_TOKENS].tolist()
            elif shape.kind == "embedding" and name in weights.modules and weights.modules[name].rank:
                changed = weights.a(shape).abs().amax(1)
                own += changed.topk(min(_NUM_OWN_TOKENS, len(changed))).indices.tolist()
        own = list(dict.fromkeys(own))[:_NUM_OWN_TOKENS]
        return (*self._fixed[: len(self._fixed) - len(own)], *own)


class _Watch:
    """Hooks on modules of an adapter, for the length of a slice."""

    def __init__(
        self,
        runner: ModelRunner,
        names: Sequence[str],
        rows: dict[str, slice],
        tokens: slice,
        observe: Callable[[str, Observed], None],
    ):
        self._runner = runner
        self._left = dict.fromkeys(names)
        self._rows = rows
        self._tokens = tokens
        self._observe = observe

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in self._left:
                shape = self._runner.targets[name]
                if shape.kind != "experts":
                    module = self._runner.base.model.get_submodule(name)
                    stack.callback(module.register_forward_hook(self._hook(shape)).remove)
            yield

    def _hook(self, shape: ModuleShape) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if shape.name in self._left:
                del self._left[shape.name]
                parts = output if isinstance(output, tuple | list) else (output,)
                self._observe(shape.name, self._cut_out(shape, args[0], [p for p in parts if isinstance(p, Tensor)]))

        return hook

    def _cut_out(self, shape: ModuleShape, x: Tensor, parts: list[Tensor]) -> Observed:
        rows = self._rows.get(shape.kind, self._tokens)
        count = rows.stop - rows.start
        if shape.kind == "leaf":
            into, out = shape.token_axes
            own = tuple(part.narrow(out, rows.start, count).clone() for part in parts)
            return Observed(x.narrow(into, rows.start, count).clone(), own)
        x = x.reshape(-1) if shape.kind == "embedding" else x.reshape(-1, x.shape[-1])
        return Observed(x[rows].clone(), tuple(part.reshape(-1, part.shape[-1])[rows].clone() for part in parts))


class _Cut(Exception):
    """The slice ends here."""


class _NotLayers(Exception):
    """The pass went by without calling a layer."""


def _run_through(slices: Generator[None, None, T]) -> T:
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


def _in_slices(
    run: Callable[[], T], layers: Sequence[nn.Module], around: Callable[[], Any]
) -> Generator[None, None, T]:
    """`run` once, one of `layers` a slice and a last one for the rest, each within `around()`."""
    last: Any = None
    for index, layer in enumerate(layers):
        with ExitStack() as stack:
            _answer_with(layers[:index], last, stack)

            def cut(module: nn.Module, args: Any, output: Any) -> None:
                nonlocal last
                last = output
                raise _Cut

            stack.callback(layer.register_forward_hook(cut).remove)
            stack.enter_context(around())
            try:
                run()
            except _Cut:
                pass
            else:
                raise _NotLayers(f"decoder layer {index} was not called")
        yield
    with ExitStack() as stack:
        _answer_with(layers, last, stack)
        stack.enter_context(around())
        return run()


def _answer_with(layers: Sequence[nn.Module], output: Any, stack: ExitStack) -> None:
    """The `layers` answer `output` and compute nothing, until `stack` closes. (Attributes that the model reads of a
    layer stay; an attribute of the instance goes before the class's forward.)"""
    for layer in layers:
        layer.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
        stack.callback(layer.__dict__.pop, "forward")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a forward pass runs one after the other; empty where they cannot be told."""
    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():  # from the outside in
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def _fixed_tokens(vocab_size: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(vocab_size, (NUM_PROBE_TOKENS,), generator=generator).tolist())
