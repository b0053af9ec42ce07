"""The run of an adapter with those it stands on: what it records, and when it refuses."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from loraplex.engine.messages import EngineRequest, Failure, FinishReason, SequenceOutput, TokenLogprobs
from loraplex.errors import AdapterInvalid, AdapterLoadFailed, LoraplexError, ProofTimedOut
from loraplex.serving.path_proof import PathProof

SIZES = {"r": 10, "m": 20, "l": 30}


class Engine:
    """Answers every sequence with `divergences`, or with `failure`; never, if it `hangs`."""

    def __init__(self, divergences: tuple[float, ...] = (0.5, 0.25), failure: str | None = None, hangs: bool = False):
        self.divergences = divergences
        self.failure = None if failure is None else Failure(failure, "It failed.")
        self.hangs = hangs
        self.asked: list[EngineRequest] = []
        self.forgotten: list[str] = []

    async def submit(self, requests: tuple[EngineRequest, ...]) -> AsyncGenerator[SequenceOutput]:
        (request,) = requests
        self.asked.append(request)
        while self.hangs:
            await asyncio.sleep(3600)
        against = request.against is not None
        found = tuple(TokenLogprobs(1, -1.0, divergence=nats if against else None) for nats in self.divergences)
        end = FinishReason.ERROR if self.failure else FinishReason.LENGTH
        yield SequenceOutput(request.seq_id, prompt_logprobs=found, finish_reason=end, failure=self.failure)

    async def command(self, name: str, **arguments: Any) -> None:
        assert name == "forget_logits"
        self.forgotten += arguments["names"]


class Catalog:
    bytes_per_value = 2

    def __init__(self) -> None:
        self.held: list[str] = []

    @contextmanager
    def hold(self, digest: str):
        self.held.append(digest)
        try:
            yield
        finally:
            self.held.remove(digest)


def version(digest: str) -> Any:
    return SimpleNamespace(digest=digest, model_id=f"{digest}@1", facts=SimpleNamespace(num_values=SIZES[digest]))


def run(engine: Engine, path: str = "rm", own: str = "l", timeout: float = 30.0) -> dict[str, Any]:
    catalog = Catalog()
    prepared: Any = SimpleNamespace(**vars(version(own)), path=tuple(map(version, path)))
    try:
        return asyncio.run(PathProof(catalog, engine, 100, timeout).run(prepared))  # type: ignore[arg-type]
    finally:
        assert not catalog.held
        assert engine.forgotten == [engine.asked[0].keeps], "nothing stays on the device"


def test_the_sum_is_held_against_base_and_parent():
    engine = Engine()
    assert run(engine) == {
        "adapters": ["r@1", "m@1"],
        "positions": 2,
        "from_base": {"mean_kl": 0.375, "max_kl": 0.5},
        "from_parent": {"mean_kl": 0.375, "max_kl": 0.5},
    }
    whole, base, parent = engine.asked
    assert [(use.digest, use.nbytes, use.scale) for use in whole.composition] == [
        ("l", 60, 1.0),
        ("m", 40, 1.0),
        ("r", 20, 1.0),
    ]
    assert base.composition == ()
    assert [use.digest for use in parent.composition] == ["m", "r"]
    assert whole.keeps == base.against == parent.against
    assert len({one.token_ids for one in engine.asked}) == 1
    assert len({one.salt for one in engine.asked}) == 3, "no blocks are shared"


def test_equal_files_on_a_path_count_twice():
    engine = Engine()
    run(engine, path="r", own="r")
    assert [(use.digest, use.scale) for use in engine.asked[0].composition] == [("r", 2.0)]


@pytest.mark.parametrize(
    ("engine", "error", "words"),
    [
        (Engine(failure="non_finite_logits"), AdapterInvalid, "Together with its parents"),
        (Engine((0.1, math.inf)), AdapterInvalid, "Together with its parents"),
        (Engine((math.nan,)), AdapterInvalid, "Together with its parents"),
        (Engine(failure="adapter_load_failed"), AdapterLoadFailed, "It failed."),
        (Engine(hangs=True), ProofTimedOut, "--proof-timeout"),
    ],
)
def test_what_is_refused(engine: Engine, error: type[LoraplexError], words: str):
    with pytest.raises(error, match=words) as caught:
        run(engine, timeout=0.05 if engine.hangs else 30.0)
    if error is AdapterInvalid:
        assert (caught.value.code, caught.value.param) == ("proof_failed", "parent")
