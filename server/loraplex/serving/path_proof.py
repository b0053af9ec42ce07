"""PathProof: an adapter that stands on others is run with them once, before it is accepted.

Its own proof has shown that the engine computes its deltas right, and the sum of several is the engine's everyday work.
What is new is the sum itself: it must be finite, and it is measured how far it moves the base and its parent.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from math import isfinite
from typing import Any

from loraplex.engine.async_engine import EngineClient
from loraplex.engine.messages import AdapterUse, Composition, EngineRequest, TokenLogprobs
from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import AdapterInvalid, ProofTimedOut
from loraplex.serving.background import entered
from loraplex.serving.catalog import AdapterCatalog, Prepared
from loraplex.serving.generation import NON_FINITE, as_error

NUM_TOKENS = 24
_PARAMS = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)


class PathProof:
    """`vocab_size`: of the base. `timeout` in seconds."""

    def __init__(self, catalog: AdapterCatalog, engine: EngineClient, vocab_size: int, timeout: float):
        self._catalog = catalog
        self._engine = engine
        self._tokens = tuple(range(0, vocab_size, max(1, vocab_size // NUM_TOKENS)))[:NUM_TOKENS]
        self._timeout = timeout

    async def run(self, prepared: Prepared) -> dict[str, Any]:
        """What to record of an adapter that stands on others. Raises AdapterInvalid, ProofTimedOut."""
        values = {one.digest: one.facts.num_values for one in prepared.path}
        values[prepared.digest] = prepared.facts.num_values
        sizes = {digest: count * self._catalog.bytes_per_value for digest, count in values.items()}
        parent = [one.digest for one in prepared.path]
        async with AsyncExitStack() as stack:
            for digest in sizes:  # the files stay while the engine may read them
                await stack.enter_async_context(entered(self._catalog.hold(digest)))
            found = await self._measure(_sum([*parent, prepared.digest], sizes), _sum(parent, sizes))
        return {"adapters": [one.model_id for one in prepared.path], **found}

    async def _measure(self, whole: Composition, parent: Composition) -> dict[str, Any]:
        kept = f"path-{secrets.token_hex(8)}"
        try:
            async with asyncio.timeout(self._timeout), self._forgetting(kept):
                await self._score(whole, keeps=kept)
                from_base = await self._score((), against=kept)
                from_parent = await self._score(parent, against=kept)
        except TimeoutError:
            raise ProofTimedOut(
                f"The adapter was not run together with its parents within {self._timeout:g} s, since the engine was "
                "busy; nothing was accepted. Send it again when there is less to do, or start the server with a larger "
                "--proof-timeout."
            ) from None
        return {"positions": len(from_base), "from_base": _figures(from_base), "from_parent": _figures(from_parent)}

    async def _score(
        self, composition: Composition, keeps: str | None = None, against: str | None = None
    ) -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        seq_id = f"path-{secrets.token_hex(8)}"
        request = EngineRequest(
            seq_id=seq_id,
            token_ids=self._tokens,
            params=_PARAMS,
            composition=composition,
            salt=seq_id.encode(),
            keeps=keeps,
            against=against,
        )
        async with aclosing(self._engine.submit((request,))) as outputs:
            async for output in outputs:
                found += output.prompt_logprobs
                if output.failure is not None and output.failure.code == NON_FINITE:
                    raise _not_finite()
                if output.failure is not None:
                    raise as_error(output.failure)
        if not all(isfinite(one.divergence or 0.0) for one in found):
            raise _not_finite()
        return found

    @asynccontextmanager
    async def _forgetting(self, kept: str) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.shield(self._engine.command("forget_logits", names=[kept]))


def _not_finite() -> AdapterInvalid:
    return AdapterInvalid(
        "Together with its parents the adapter gives NaN or infinity on this base, though each of them alone does not. "
        "Check that it was trained on top of them, or push it with another parent.",
        param="parent",
        code="proof_failed",
    )


def _sum(digests: Iterable[str], sizes: Mapping[str, int]) -> Composition:
    """In the order in which requests have it."""
    return tuple(AdapterUse(digest, sizes[digest], float(count)) for digest, count in sorted(Counter(digests).items()))


def _figures(found: Sequence[TokenLogprobs]) -> dict[str, float]:
    """In nats, before || after."""
    nats = [one.divergence for one in found if one.divergence is not None]
    return {"mean_kl": float(f"{sum(nats) / max(1, len(nats)):.3g}"), "max_kl": float(f"{max(nats, default=0.0):.3g}")}
