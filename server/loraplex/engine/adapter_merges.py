"""AdapterMerges: merged weights built beside the base's, one adapter at a time, in a worker thread.

The engine thread starts builds, installs what they give between two steps and drops sets; traffic is served on the
base's weights with the ordinary delta until then. Reads weights only.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_loads import FinishedLoad
from loraplex.engine.memory import available_memory
from loraplex.engine.merge_policy import MergePolicy
from loraplex.engine.messages import AdapterUse, CommandResult, Failure
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler
from loraplex.lora.weights import LoRAWeights
from loraplex.model.merged import MergedWeights, NotFinite, merge, merged_nbytes

MAX_ERROR = 0.05
"""Share of the delta that rounding may take before `--merge auto` leaves an adapter alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStatus:
    """How an adapter's merged weights stand. Picklable.

    state      "waiting" (for its turn or for the adapter), "building", "ready", "refused"
    progress   of the build, 0 to 1
    nbytes     what the set occupies, or would
    error      ‖(W′ - W) - ΔW‖ / ‖ΔW‖, once it is built
    num_steps  steps that ran on the set
    """

    digest: str
    state: str
    is_automatic: bool = False
    progress: float = 0.0
    nbytes: int = 0
    error: float = 0.0
    seconds: float = 0.0
    num_steps: int = 0
    failure: Failure | None = None


@dataclass(slots=True)
class _Job:
    use: AdapterUse
    status: MergeStatus
    command_ids: list[int] = field(default_factory=list)
    progress: float = 0.0  # written by the worker
    is_cancelled: bool = False  # read by the worker


class _Cancelled(Exception):
    pass


class AdapterMerges:
    def __init__(
        self,
        runner: ModelRunner,
        cache: AdapterCache,
        scheduler: Scheduler,
        policy: MergePolicy | None = None,
        on_finish: Callable[[], None] = lambda: None,
    ):
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._policy = policy
        self._on_finish = on_finish
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="adapter-merge")
        self._built: SimpleQueue[tuple[_Job, MergedWeights | Failure | None, float]] = SimpleQueue()
        self._jobs: dict[str, _Job] = {}  # in the order they came; the first may be in the worker's hands
        self._building: _Job | None = None
        self._ended: dict[str, MergeStatus] = {}  # ready and refused
        self._answers: list[CommandResult] = []  # of builds that were called off
        self.num_merged_steps = 0

    # -- asked for --------------------------------------------------------------------------------------------

    def add(self, use: AdapterUse, command_id: int) -> MergeStatus | None:
        """Have the adapter's set built; its status when it is there, None when the answer comes with a later step."""
        ended = self._ended.get(use.digest)
        if ended is not None and ended.state == "ready":
            self._ended[use.digest] = ended = replace(ended, is_automatic=False)
            if self._policy is not None:
                self._policy.forget(use.digest)
            return ended
        self._enqueue(use, is_automatic=False).command_ids.append(command_id)
        return None

    def remove(self, digest: str) -> None:
        """Drop the set, or stop building it. KeyError when there is neither."""
        job = self._jobs.pop(digest, None)
        ended = self._ended.pop(digest, None)
        if job is None and ended is None:
            raise KeyError(f"adapter {digest} is not merged")
        if digest in self._runner.merged:
            self._runner.remove(digest)
        if self._policy is not None:
            self._policy.forget(digest)
        if job is not None:
            job.is_cancelled = True
            message = "The merge was called off: the adapter was unmerged or deleted meanwhile."
            failure = Failure("merge_cancelled", message)
            self._answers += self._answer(job, replace(job.status, state="refused", failure=failure))

    def forget(self, digest: str) -> None:
        """The adapter was deleted."""
        if digest in self._jobs or digest in self._ended:
            self.remove(digest)

    # -- the engine's steps -----------------------------------------------------------------------------------

    def observe(self, sole: str | None, use: AdapterUse | None) -> None:
        """Take in a step that ran: whose every row was, if anybody's."""
        if sole is not None and sole in self._runner.merged:
            self.num_merged_steps += 1
            status = self._ended[sole]
            self._ended[sole] = replace(status, num_steps=status.num_steps + 1)
        if self._policy is None:
            return
        wish = self._policy.observe(sole)
        if wish.drop is not None and any(s.digest == wish.drop and s.is_automatic for s in self.statuses):
            self.remove(wish.drop)
        if wish.build is not None and use is not None and wish.build not in self._ended:
            self._enqueue(use, is_automatic=True)

    def finish_load(self, load: FinishedLoad) -> None:
        job = self._jobs.get(load.digest)
        if load.error is not None and job is not None and job is not self._building:
            self._answers += self._end(job, Failure(load.error.code, load.error.message))

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._answers)

    def work(self) -> list[CommandResult]:
        """Install what was built and start the next build; the answers of those that ended."""
        answers, self._answers = self._answers, []
        while True:
            try:
                job, result, seconds = self._built.get_nowait()
            except Empty:
                break
            self._building = None
            if not job.is_cancelled:
                job.status = replace(job.status, seconds=seconds)
                answers += self._end(job, result)
        if self._building is None and self._jobs:
            answers += self._begin(next(iter(self._jobs.values())))
        return answers

    def _begin(self, job: _Job) -> list[CommandResult]:
        """Give the job to the worker once its adapter is in RAM, or refuse it."""
        digest = job.use.digest
        if digest not in self._cache:
            if not self._cache.can_ever_hold([job.use]):
                return self._end(job, _no_room(job.use.nbytes))
            self._scheduler.load(job.use)
            return []
        weights = self._cache.peek(digest)
        failure = self._refusal(weights)
        if failure is not None:
            return self._end(job, failure)
        nbytes = merged_nbytes(self._runner.base, weights)
        job.status = replace(job.status, state="building", nbytes=nbytes)
        self._building = job
        self._executor.submit(self._build, job, weights)
        return []

    def _refusal(self, weights: LoRAWeights) -> Failure | None:
        if not weights.is_additive:
            return Failure(
                "not_mergeable",
                "The adapter is more than deltas (DoRA, trained biases, modules_to_save or trained token rows), and "
                "only W + s·B·A is merged. It is served unmerged.",
            )
        if self._runner.base.quantization is not None:
            kind = self._runner.base.quantization.kind
            return Failure(
                "not_mergeable",
                f"The base is quantised ({kind}): W + s·B·A would have to be rounded to {kind} again. The adapter is "
                "served unmerged, on top of it.",
            )
        needed = merged_nbytes(self._runner.base, weights)
        # the RAM tier may grow yet
        available = available_memory(self._runner.base.device) - int(self._cache.maxsize - self._cache.currsize)
        if needed > available:
            return Failure(
                "insufficient_memory",
                f"The merged weights need {needed} bytes beside the base's, and {max(0, available)} are available on "
                f"{self._runner.base.device}. Unmerge another adapter, or lower --kv-cache-bytes or "
                "--adapter-cache-bytes.",
            )
        return None

    def _end(self, job: _Job, result: MergedWeights | Failure | None) -> list[CommandResult]:
        digest = job.use.digest
        self._jobs.pop(digest, None)
        status = job.status
        if isinstance(result, MergedWeights):
            status = replace(status, state="ready", progress=1.0, error=result.error, nbytes=result.nbytes)
            if status.is_automatic and result.error > MAX_ERROR:
                result = _rounded_away(result.error, str(self._runner.base.dtype).removeprefix("torch."))
            else:
                self._runner.install(result)
        if isinstance(result, Failure):
            status = replace(status, state="refused", failure=result)
            if self._policy is not None:
                self._policy.forget(digest)
        self._ended[digest] = status
        return self._answer(job, status)

    def _answer(self, job: _Job, status: MergeStatus) -> list[CommandResult]:
        return [CommandResult(command_id, status) for command_id in job.command_ids]

    def _enqueue(self, use: AdapterUse, *, is_automatic: bool) -> _Job:
        job = self._jobs.get(use.digest)
        if job is None:
            status = MergeStatus(digest=use.digest, state="waiting", is_automatic=is_automatic)
            job = self._jobs[use.digest] = _Job(replace(use, scale=1.0), status)
            self._ended.pop(use.digest, None)
        elif not is_automatic:
            job.status = replace(job.status, is_automatic=False)
        return job

    # -- the worker -------------------------------------------------------------------------------------------

    def _build(self, job: _Job, weights: LoRAWeights) -> None:
        started = time.perf_counter()

        def on_module(done: int, count: int) -> None:
            if job.is_cancelled:
                raise _Cancelled
            job.progress = done / count

        result: MergedWeights | Failure | None = None
        try:
            result = merge(self._runner.base, weights, self._runner.ops, on_module)
        except _Cancelled:
            pass
        except NotFinite as error:
            result = Failure("not_mergeable", f"{error}. Serve the adapter unmerged, or use --dtype float32.")
        except Exception as error:  # a build must answer, whatever happens in it
            result = Failure("merge_failed", f"The merged weights could not be made: {type(error).__name__}: {error}.")
        self._built.put((job, result, time.perf_counter() - started))
        self._on_finish()

    # -- views ------------------------------------------------------------------------------------------------

    @property
    def statuses(self) -> tuple[MergeStatus, ...]:
        pending = (replace(job.status, progress=job.progress) for job in self._jobs.values())
        return (*self._ended.values(), *pending)

    def close(self) -> None:
        """Stop building and drop every set."""
        for job in self._jobs.values():
            job.is_cancelled = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        for digest in tuple(self._runner.merged):
            self._runner.remove(digest)

    def check_integrity(self) -> None:
        """Raise AssertionError when the sets and their statuses disagree."""
        ready = {digest for digest, status in self._ended.items() if status.state == "ready"}
        assert ready == set(self._runner.merged), f"ready {ready}, installed {set(self._runner.merged)}"
        assert not ready & self._jobs.keys(), "a set is built that is there"


def _no_room(nbytes: int) -> Failure:
    return Failure(
        "adapter_too_large",
        f"The adapter needs {nbytes} bytes in RAM and does not fit beside the pinned ones. Unpin some, or start the "
        "server with a larger --adapter-cache-bytes.",
    )


def _rounded_away(error: float, dtype: str) -> Failure:
    return Failure(
        "merge_too_coarse",
        f"Rounding W + s·B·A to {dtype} takes {error:.1%} of the delta (automatic merging allows {MAX_ERROR:.0%}). The "
        "adapter is served unmerged, which is exact; --dtype float32 merges without that loss.",
    )
