"""EngineConfig: the sizes the engine works within. Plain data: picklable, no torch, no pydantic."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All lengths in tokens, all steps in engine steps, all sizes in bytes.

    max_num_seqs            sequences in one step
    max_num_batched_tokens  new tokens in one step; at least max_num_seqs, so a decode is never put off
    max_model_len           prompt and output of one sequence
    max_waiting             sequences in the waiting queue; one more is refused (Overloaded)
    block_size, num_blocks  the paged KV cache
    max_loras               pool places: distinct adapters in one step
    place_bytes             memory of each place and of the proofs' one; 0: the device reads the RAM tier's
    adapter_cache_bytes     RAM tier
    eviction                which adapter leaves it first: a name of `eviction.eviction_policy`
    max_concurrent_loads    disk reads under way at once
    max_concurrent_copies   adapters on their way from RAM to the device at once, where that has its own memory
    merge                   "off", "manual" or "auto": may steps that are one adapter's own run on merged weights
    graph_rank              steps of decoding alone, with adapters of at most this rank, are captured as CUDA graphs;
                            None: no step is
    fairness_quantum        steps a blocked adapter waits, and a running one keeps its place, before the place turns
    eos_token_ids           union of config, generation_config and tokenizer
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 1024
    max_waiting: int = 1024
    block_size: int = 16
    num_blocks: int = 512
    max_loras: int = 8
    place_bytes: int = 0
    adapter_cache_bytes: int = 2 << 30
    eviction: str = "lrfu"
    max_concurrent_loads: int = 2
    max_concurrent_copies: int = 4
    merge: str = "off"
    graph_rank: int | None = None
    fairness_quantum: int = 32
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for field in (
            "max_num_seqs",
            "max_model_len",
            "block_size",
            "num_blocks",
            "max_loras",
            "fairness_quantum",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or a running sequence could be left out of a step"
            )
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"{self.num_blocks} KV blocks of {self.block_size} tokens cannot hold one sequence of "
                f"{self.max_model_len} tokens; give more --kv-cache-bytes or a smaller --max-model-len"
            )
