"""The proof of an adapter: what the engine computes with it is what its files say, module by module, and it has an
effect.

A probe (`probe`) runs through the batched path, the adapter's rows between rows of the base. Of each module of the
adapter, what went in is taken, and what the path makes of it compared with the same equation in float32:

    delta    s·B·A·x by the kernels from the adapter's place     against  s·(x·Aᵀ)·Bᵀ
    product  the layer's whole answer in the pass                against  x·(W + s·B·A)ᵀ + b, W + s·B·A formed first
    own      a leaf's answer in the pass                         against  the base's module with those parameters

Then the neighbours' logits must be what they are without it, and its own must be finite and differ from the base's.
What no module shows (attention, the model's own code between modules) is the base's, proven at load.
"""

import time
from collections.abc import Generator

import torch
from torch import Tensor
from torch.func import functional_call

from loraplex.engine.messages import Failure
from loraplex.engine.probe import Observed, Probe, ProbeLogits
from loraplex.engine.proof_result import Divergence, ModuleFigures, ProofResult
from loraplex.engine.runner import ModelRunner
from loraplex.lora.weights import LoRAWeights, ModuleShape
from loraplex.model.lora_layers import BaseLinear
from loraplex.model.targets import base_of
from loraplex.ops import LoRASegments

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error of a row allowed, as a share of the row's largest value (or of what the norms of its factors let one
expect, where that is more: a single output may cancel): a few roundings of the type."""

MAX_OUTPUTS = 128
"""Outputs of a module at which the whole product is compared, in runs of `_RUN`, evenly over all: the cost is that of
so many rows of W + s·B·A."""

_RUN = 32

_SERVER_FAULT = "That is a fault of this server, not of the adapter: please report it with the adapter's config."


class Refuted(Exception):
    """The adapter does not pass; the failure says why."""

    def __init__(self, message: str, code: str = "proof_failed"):
        super().__init__(message)
        self.failure = Failure(code, message)


class AdapterProof:
    """Proves the adapter `weights`, which stands in the runner's probe place meanwhile."""

    def __init__(self, runner: ModelRunner, probe: Probe, weights: LoRAWeights):
        self._runner = runner
        self._probe = probe
        self._weights = weights
        self._pending: list[tuple[str, Observed]] = []
        self._figures: list[ModuleFigures] = []
        self._seconds = 0.0
        self._num_slices = 0

    def run(self) -> Generator[None, None, ProofResult]:
        """Yields where other steps may run in between; a slice is a decoder layer of the pass, or one module's checks.
        The adapter is put into the probe place first, and leaves it whatever happens."""
        steps = self._prove()
        try:
            self._runner.pool.load(self._runner.probe_place, self._weights)
            while True:
                started = time.perf_counter()
                try:
                    with torch.inference_mode():
                        next(steps)
                except StopIteration as end:
                    self._clock(started)
                    return self._result(**end.value)
                except Refuted as refuted:
                    self._clock(started)
                    return self._result(failure=refuted.failure)
                self._clock(started)
                yield
        finally:
            steps.close()
            self._runner.pool.clear(self._runner.probe_place)

    def _clock(self, started: float) -> None:
        if self._runner.base.device.type == "cuda":
            torch.cuda.synchronize(self._runner.base.device)
        self._seconds += time.perf_counter() - started
        self._num_slices += 1

    def _result(self, **found) -> ProofResult:
        base = self._runner.base
        return ProofResult(
            base_fingerprint=base.fingerprint,
            dtype=str(base.dtype).removeprefix("torch."),
            device=str(base.device),
            quantization=None if base.quantization is None else base.quantization.kind,
            tolerance=self._tolerance,
            modules=tuple(self._figures),
            seconds=self._seconds,
            num_slices=self._num_slices,
            **found,
        )

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self._runner.base.dtype]

    # -- the steps of the proof -------------------------------------------------------------------------------

    def _prove(self) -> Generator[None, None, dict]:
        witness = self._probe.witness()
        yield
        forward = self._probe.run(self._weights, lambda name, observed: self._pending.append((name, observed)))
        seen: set[str] = set()
        logits: ProbeLogits | None = None
        while logits is None:
            try:
                next(forward)
            except StopIteration as end:
                logits = end.value
            yield
            for name, observed in self._pending:
                seen.add(name)
                self._figures.append(self._check(self._runner.targets[name], observed))
                yield
            self._pending.clear()
        for name in dict.fromkeys([*self._weights.modules, *self._weights.replaced]):
            if name not in seen:  # experts, and what the model computes without calling its module
                self._figures.append(self._check(self._runner.targets[name], None))
                yield
        isolation_error = self._compare_neighbours(witness, logits)
        return {"isolation_error": isolation_error, "divergence": self._diverge(logits)}

    def _check(self, shape: ModuleShape, observed: Observed | None) -> ModuleFigures:
        if observed is not None:
            self._check_finite(shape, *observed.y)
        if shape.kind == "leaf":
            figures = ModuleFigures(shape.name, shape.kind, own=self._own(shape, observed) if observed else None)
        else:
            delta = self._delta(shape, observed.x if observed is not None else None)
            product, num_outputs = (None, 0) if observed is None else self._product(shape, observed)
            figures = ModuleFigures(shape.name, shape.kind, delta, product, num_outputs=num_outputs)
        if not figures.error <= self._tolerance:
            raise Refuted(
                f"The adapter failed the proof: at {shape.name!r} the batched path differs from the adapter's own "
                f"arithmetic in float32 by {figures.error:.2g} of its range (allowed: {self._tolerance:g}). "
                + _SERVER_FAULT
            )
        return figures

    def _check_finite(self, shape: ModuleShape, *parts: Tensor) -> None:
        if not all(bool(part.isfinite().all()) for part in parts):
            raise Refuted(
                f"The adapter gives NaN or infinity at {shape.name!r}, or before it, when it is run on this base in "
                f"{self._dtype_name}. Its numbers are finite, their products are not: check lora_alpha and the "
                "training run, or serve the base in a type with a wider range (--dtype)."
            )

    @property
    def _dtype_name(self) -> str:
        return str(self._runner.base.dtype).removeprefix("torch.")

    # -- one module -------------------------------------------------------------------------------------------

    def _delta(self, shape: ModuleShape, x: Tensor | None) -> float | None:
        """The kernels on rows of the probe (or, where none were seen, of noise) between two rows that are no one's.

        Of experts: a row for each expert.
        """
        weights, runner = self._weights, self._runner
        delta = weights.modules.get(shape.name)
        if delta is None or not delta.rank:
            return None
        a, bt = (part.to(runner.base.device).float() for part in (weights.a(shape), weights.bt(shape)))
        dtype = runner.base.dtype
        count = shape.num_experts
        if shape.kind == "experts":
            x = self._noise(count, shape.in_features)
            shrunk = torch.einsum("ei,eri->er", x.float(), a)
            expected = delta.scaling * torch.einsum("er,ero->eo", shrunk, bt)
            starts, places = range(count), range(runner.probe_place * count, (runner.probe_place + 1) * count)
        else:
            if x is None:
                noise = self._noise(4, shape.in_features if shape.kind != "embedding" else 1)
                x = torch.arange(4, device=noise.device) if shape.kind == "embedding" else noise
            shrunk = a[x] if shape.kind == "embedding" else x.float() @ a.T
            expected = delta.scaling * shrunk @ bt
            starts, places = [0], [runner.probe_place]
        self._check_finite(shape, expected)
        num_rows = len(expected)
        ends = [*starts[1:], num_rows]
        found = torch.zeros(num_rows + 2, shape.out_features, dtype=dtype, device=x.device)
        segments = self._segments([s + 1 for s in starts], [e + 1 for e in ends], list(places), starts, delta.rank)
        pool = runner.pool.modules[shape.name]
        if shape.kind == "embedding":
            runner.ops.expand(found, shrunk.contiguous(), pool, segments)
        else:
            beside = torch.cat([x[:1], x, x[-1:]])
            runner.ops.add_lora(found, beside, pool, segments)
        if bool(found[0].any()) or bool(found[-1].any()):
            raise Refuted(
                f"The adapter failed the proof: at {shape.name!r} its delta reaches rows of the batch that are not its "
                f"own. {_SERVER_FAULT}"
            )
        usual = _norm(shrunk, -1)
        if shape.kind != "embedding":
            usual = torch.maximum(usual, _usual(x, _norm(a, (-2, -1))))
        usual = abs(delta.scaling) * usual * _norm(bt, -2).amax(-1) / delta.rank**0.5
        return _error(found[1:-1], expected, torch.maximum(expected.abs().amax(-1).double(), usual))

    def _segments(self, starts: list[int], ends: list[int], places: list[int], offsets, rank: int) -> LoRASegments:
        def ints(values) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=self._runner.base.device)

        scale = torch.ones(len(places), dtype=torch.float32, device=self._runner.base.device)
        return LoRASegments(ints(starts), ints(ends), ints(places), scale, ints(offsets), ends[-1] - starts[0], rank)

    def _noise(self, count: int, features: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, features, generator=generator).to(self._runner.base.device, self._runner.base.dtype)

    def _product(self, shape: ModuleShape, observed: Observed) -> tuple[float, int]:
        """The layer's answer at a choice of its outputs, against W + s·B·A formed in float32."""
        if shape.kind == "embedding":
            return self._looked_up(shape, observed)
        weights, device = self._weights, self._runner.base.device
        runs = _runs(shape.out_features)
        chosen = torch.cat([torch.arange(start, stop) for start, stop in runs]).to(device)
        count = len(chosen)
        x, y = observed.x.float(), observed.y[0][:, chosen]
        merged = self._rows_of_weight(shape, runs, chosen)
        extra, delta = weights.extra(shape), weights.modules.get(shape.name)
        bias = self._base_bias(shape)
        offset = torch.zeros(count, device=device) if bias is None else bias[chosen].float()
        if extra is not None and extra.gain is not None:
            merged *= extra.gain.to(device)[chosen].float().unsqueeze(1)
        base = x @ merged.T + offset
        if delta is not None and delta.rank:
            a, bt = weights.a(shape).to(device).float(), weights.bt(shape).to(device)[:, chosen].float()
            merged += delta.scaling * bt.T @ a
        if extra is not None and extra.shift is not None:
            offset = offset + extra.shift.to(device)[chosen].float()
        expected = x @ merged.T + offset
        self._check_finite(shape, base, expected)
        largest = torch.maximum(torch.maximum(base.abs(), expected.abs()), (expected - base).abs()).amax(-1)
        return _error(y, expected, torch.maximum(largest.double(), _usual(x, _norm(merged, -1).amax()))), count

    def _rows_of_weight(self, shape: ModuleShape, runs: list[tuple[int, int]], chosen: Tensor) -> Tensor:
        """float32 [len(chosen), in_features], a new tensor: the base's rows, or the adapter's own."""
        layer = self._runner.base.model.get_submodule(shape.name)
        assert isinstance(layer, BaseLinear)
        rows = layer.way.rows(runs).float()
        extra = self._weights.extra(shape)
        own = None if extra is None else extra.replaced.get("weight")
        if extra is None or own is None:
            return rows
        own = own.to(rows.device)
        if extra.rows is None:
            return own[chosen].float()
        trained = extra.rows.to(rows.device)
        at = torch.searchsorted(trained, chosen).clamp_(max=len(trained) - 1)
        is_own = trained[at] == chosen
        return torch.where(is_own.unsqueeze(1), own[at].float(), rows)

    def _base_bias(self, shape: ModuleShape) -> Tensor | None:
        return self._runner.base.tensor_of(f"{shape.name}.bias") if "bias" in shape.parameters else None

    def _looked_up(self, shape: ModuleShape, observed: Observed) -> tuple[float, int]:
        """An embedding's rows, all outputs."""
        weights, device, tokens = self._weights, self._runner.base.device, observed.x
        rows = self._runner.base.tensor_of(f"{shape.name}.weight")[tokens].float()
        extra, delta = weights.extra(shape), weights.modules.get(shape.name)
        own = None if extra is None else extra.replaced.get("weight")
        if extra is not None and own is not None:
            own = own.to(device).float()
            if extra.rows is None:
                rows = own[tokens]
            else:
                trained = extra.rows.to(device)
                at = torch.searchsorted(trained, tokens).clamp_(max=len(trained) - 1)
                rows = torch.where((trained[at] == tokens).unsqueeze(1), own[at], rows)
        base = rows * shape.output_scale
        if extra is not None and extra.gain is not None:
            base = base * extra.gain.to(device).float()
        expected = base
        if delta is not None and delta.rank:
            a, bt = (part.to(device).float() for part in (weights.a(shape), weights.bt(shape)))
            expected = base + delta.scaling * a[tokens] @ bt
        self._check_finite(shape, expected)
        largest = torch.maximum(base.abs(), expected.abs()).amax(-1)
        return _error(observed.y[0], expected, largest), shape.out_features

    def _own(self, shape: ModuleShape, observed: Observed) -> float:
        """The base's own module with the adapter's parameters, in the type that is served."""
        extra = self._weights.extra(shape)
        assert extra is not None, "a leaf is adapted by its parameters only"
        device = self._runner.base.device
        module = base_of(self._runner.base.model.get_submodule(shape.name))
        own = {name: tensor.to(device) for name, tensor in extra.replaced.items()}
        answer = functional_call(module, own, (observed.x,))
        answers = answer if isinstance(answer, tuple | list) else [answer]
        parts = [part for part in answers if isinstance(part, Tensor)]
        errors = [
            _error(found.reshape(1, -1), expected.reshape(1, -1).float(), expected.float().abs().max().reshape(1))
            for found, expected in zip(observed.y, parts, strict=True)
            if found.is_floating_point()  # a router's choices follow from its logits
        ]
        return float(torch.tensor(errors).max())  # NaN if one is

    # -- the logits -------------------------------------------------------------------------------------------

    def _compare_neighbours(self, witness: Tensor, logits: ProbeLogits) -> float:
        error = _error(logits.witness, witness, (witness.amax(-1) - witness.amin(-1)))
        if not error <= self._tolerance:
            raise Refuted(
                f"The adapter failed the proof: beside it, rows of the base differ by {error:.2g} of their range from "
                f"the same rows without it (allowed: {self._tolerance:g}). {_SERVER_FAULT}"
            )
        return error

    def _diverge(self, logits: ProbeLogits) -> Divergence:
        if not bool(logits.base.isfinite().all()):
            raise Refuted(
                f"The base itself gives NaN or infinity on the probe's tokens in {self._dtype_name}, so nothing can be "
                "proven on it. Serve it in a type with a wider range (--dtype)."
            )
        if not bool(logits.adapter.isfinite().all()):
            raise Refuted(
                f"The adapter's logits are NaN or infinite on this base in {self._dtype_name}. Its numbers are finite, "
                "what they make of the base's activations is not: check lora_alpha and the training run, or serve the "
                "base in a type with a wider range (--dtype)."
            )
        has_experts = any(self._runner.targets[name].kind == "experts" for name in self._weights.modules)
        if torch.equal(logits.adapter, logits.base) and not has_experts:
            raise Refuted(
                f"The adapter is without effect: in {self._dtype_name} its logits equal the base's to the last bit at "
                f"all {len(logits.base)} positions of the probe. Check that it was saved after training, and that "
                "lora_alpha and the matrices are not so small that they vanish in rounding."
            )
        base, adapter = logits.base.log_softmax(-1), logits.adapter.log_softmax(-1)
        kl = (base.exp() * (base - adapter)).sum(-1).clamp_(min=0).double()  # their mean may be beyond float32
        difference = (logits.adapter - logits.base).abs().max()
        if not bool(kl.isfinite().all() & difference.isfinite()):
            raise Refuted(
                "The adapter's logits are finite, but so large that probabilities cannot be computed from them. Check "
                "lora_alpha and the training run."
            )
        return Divergence(
            max_difference=float(difference),
            mean_kl=float(kl.mean()),
            max_kl=float(kl.max()),
            num_changed=int((base.argmax(-1) != adapter.argmax(-1)).sum()),
            num_positions=len(kl),
        )


def _runs(num_outputs: int) -> list[tuple[int, int]]:
    """At most MAX_OUTPUTS of the outputs as ranges start:stop, the first and the last among them."""
    if num_outputs <= MAX_OUTPUTS:
        return [(0, num_outputs)]
    count = MAX_OUTPUTS // _RUN
    step = (num_outputs - _RUN) / (count - 1)
    starts = [int(index * step) // _RUN * _RUN for index in range(count - 1)]
    return [*((start, start + _RUN) for start in starts), (num_outputs - _RUN, num_outputs)]


def _usual(x: Tensor, norm: Tensor) -> Tensor:
    """[n]: as large as the products of rows x [n, in] with a vector of this norm usually are."""
    return _norm(x, -1) * norm / x.shape[-1] ** 0.5


def _norm(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """float64. Summed in it, too, where squares leave the range of float32 (at ten times the cost)."""
    norm = x.square().sum(dim).sqrt()
    if bool(((norm > 1e-15) & (norm < 1e15)).all()):
        return norm.double()
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)


def _error(found: Tensor, expected: Tensor, largest: Tensor) -> float:
    """The largest difference of a row as a share of the row's `largest` value; NaN when anything is."""
    info = torch.finfo(found.dtype)
    # differences below what the type can hold are no error
    floor = info.smallest_normal if found.dtype is not torch.float16 else info.smallest_normal * info.eps
    difference = (found.float() - expected.float()).abs().amax(-1)
    share = (difference - floor).clamp_(min=0) / largest.clamp_min(torch.finfo(torch.float32).smallest_normal)
    return float(share.max())
