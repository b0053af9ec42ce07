"""Sequence: one prompt and its growing output, with a single counter of progress.

There is no prefill or decode phase: `num_computed_tokens` catches up with `num_tokens`. A prompt, a chunk of it, one
decoded token and the resumption after a preemption are the same thing.

    token_ids  | prompt ............ | output ...... |
               0          num_prompt_tokens       num_tokens
    KV cache   | computed ..... | new → this step's tokens
               0     num_computed_tokens
"""

from enum import Enum, auto

from loraplex.engine.messages import EngineRequest, FinishReason


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    def __init__(self, request: EngineRequest, arrival: int):
        self.request = request
        self.arrival = arrival
        self.status = SequenceStatus.WAITING
        self.token_ids = list(request.token_ids)
        self.num_prompt_tokens = len(request.token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache at the first admission
        # prompt positions already reported, or not to be; survives a preemption
        self.num_prompt_logprobs = request.params.prompt_logprobs_from
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the full blocks of token_ids, as far as they were needed
        self.num_committed_blocks = 0
        self.digests = tuple(use.digest for use in request.composition)
        self.was_admitted = False
        # The present turn, from an admission to the next preemption.
        self.admitted_step = -1
        self.first_token_step: int | None = None  # None while what was known at the admission is being computed
        self.was_set_back = False  # the last turn ended before it brought a token
        self.finish_reason: FinishReason | None = None

    @property
    def seq_id(self) -> str:
        return self.request.seq_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens whose keys and values are not computed yet; at least 1 while the sequence lives."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.params.prompt_logprobs is not None

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.status.name}, {self.num_computed_tokens}/{self.num_tokens})"
