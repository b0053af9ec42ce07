"""AdapterProofs: the proofs that wait and the one under way: the engine's work of lowest priority.

A proof takes of the RAM tier what nobody needs, and the time between steps: of each step's time a share, in slices
that fit into it (what a longer one needs is saved up), and all of it while nothing else runs. One at a time, in the
order they came.
"""

import time
import traceback
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_ledger import Left
from loraplex.engine.adapter_loads import FinishedLoad
from loraplex.engine.adapter_proof import AdapterProof
from loraplex.engine.messages import AdapterUse, CommandResult, Failure
from loraplex.engine.probe import Probe
from loraplex.engine.proof_result import ProofResult
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler

BUSY_SHARE = 0.25
"""Of the time of the steps, what a proof may take beside them."""

IDLE_SECONDS = 0.01
"""After so long messages are looked at again, while nothing else runs."""


@dataclass(slots=True)
class _Job:
    """`deadline` counts from the moment the proof begins, on the monotonic clock; None: it has not begun."""

    command_id: int
    use: AdapterUse
    timeout: float
    deadline: float | None = None
    load_failure: Failure | None = None
    proof: Generator[None, None, ProofResult] | None = None


class AdapterProofs:
    def __init__(self, runner: ModelRunner, cache: AdapterCache, scheduler: Scheduler):
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._probe = Probe(runner)
        self._jobs: deque[_Job] = deque()
        self._credit = 0.0  # seconds a proof may take beside steps, saved for one slice; negative after a long one
        self._slice = 0.0  # seconds that the next slice may take, by the last ones
        self.is_waiting = False  # for a load or for room in RAM: nothing to do before a message comes
        self.last_error: str | None = None  # the traceback of a proof that broke

    def prepare(self) -> None:
        """Run the probe without an adapter, as long as nothing else runs."""
        self._probe.witness()

    def add(self, command_id: int, use: AdapterUse, timeout: float) -> None:
        """Prove the adapter within `timeout` seconds from when its turn comes. The answer, a ProofResult, comes with a
        later step."""
        self._jobs.append(_Job(command_id, use, timeout))

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def finish_load(self, load: FinishedLoad) -> None:
        if load.error is not None:
            for job in self._jobs:
                if job.use.digest == load.digest:
                    job.load_failure = Failure(load.error.code, load.error.message)

    def work(self, step_seconds: float | None) -> list[CommandResult]:
        """Some of the proofs' work after a step of `step_seconds` (None: nothing ran); the answers of those that
        ended."""
        answers: list[CommandResult] = []
        self.is_waiting = False
        if not self._jobs:
            return answers
        if step_seconds is None:
            budget, reserve = IDLE_SECONDS, 0.0
        else:
            share = BUSY_SHARE * step_seconds
            budget, reserve = min(self._credit + share, max(share, self._slice)), self._slice
        started = time.perf_counter()
        spent = 0.0
        while self._jobs and spent + reserve <= budget and not self.is_waiting:
            job = self._jobs[0]
            result = self._advance(job)
            if result is not None:
                self._jobs.popleft()
                answers.append(CommandResult(job.command_id, result))
            before, spent = spent, time.perf_counter() - started
            self._slice = max(spent - before, 0.9 * self._slice)
        self._credit = budget - spent if step_seconds is not None else 0.0
        return answers

    def _advance(self, job: _Job) -> ProofResult | None:
        """One slice of `job`; its result when it has ended."""
        if job.deadline is None:
            job.deadline = time.monotonic() + job.timeout
        if time.monotonic() > job.deadline:
            return self._end(job, _out_of_time(job))
        if job.proof is None:
            failure = self._begin(job)
            return None if failure is None else self._end(job, failure)
        try:
            next(job.proof)
        except StopIteration as end:
            if end.value.failure is not None:
                self._forget(job)
            return end.value
        except Exception as error:
            self.last_error = "".join(traceback.format_exception(error))
            message = f"The engine failed while proving the adapter: {type(error).__name__}: {error}."
            return self._end(job, Failure("engine_step_failed", message))
        return None

    def _begin(self, job: _Job) -> Failure | None:
        """Start the proof if the adapter is in RAM; else have it read."""
        digest = job.use.digest
        if job.load_failure is not None:
            return job.load_failure
        if digest in self._cache:
            job.proof = AdapterProof(self._runner, self._probe, self._cache.peek(digest)).run()
        elif not self._cache.can_ever_hold([job.use]):
            return Failure(
                "adapter_too_large",
                f"The adapter needs {job.use.nbytes} bytes in RAM and does not fit beside the pinned ones. Unpin some, "
                "or start the server with a larger --adapter-cache-bytes.",
            )
        else:
            self._scheduler.load(job.use)
            self.is_waiting = True
        return None

    def _end(self, job: _Job, failure: Failure) -> ProofResult:
        if job.proof is not None:
            job.proof.close()
        self._forget(job)
        base = self._runner.base
        dtype = str(base.dtype).removeprefix("torch.")
        return ProofResult(base_fingerprint=base.fingerprint, dtype=dtype, device=str(base.device), failure=failure)

    def _forget(self, job: _Job) -> None:
        """Let an adapter that failed go from RAM, unless another version of the same files is being served."""
        if not self._cache.num_leases(job.use.digest) and not self._cache.is_pinned(job.use.digest):
            self._cache.evict(job.use.digest, Left.REFUSED)


def _out_of_time(job: _Job) -> Failure:
    what = "was not proven" if job.proof is not None else "could not be brought into RAM to be proven"
    return Failure(
        "proof_timeout",
        f"The adapter {what} within {job.timeout:g} s, since the engine was busy; nothing was accepted. Send it again "
        "when there is less to do, or start the server with a larger --proof-timeout.",
    )
