"""BlockManager: which blocks of the paged KV cache belong to whom, and which can be shared.

A full block is identified by a hash chained over (composition, salt, all tokens up to its end). Blocks are shared only
between sequences for which all of that is equal; an adapter is named by its digest, so an upload under an old name can
never meet old keys and values. A freed block keeps its content and its hash until the block is needed: `_free` is the
LRU order in which they are given away. Pure Python over ints.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable

from loraplex.engine.messages import Composition
from loraplex.engine.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """The cached blocks that begin `seq`, at most so many that one token is left to compute.

        Of a prompt whose logits it needs a sequence reads nothing from the cache: they are not stored there.
        """
        limit = seq.num_tokens - 1
        if seq.wants_prompt_logprobs:
            limit = min(limit, seq.request.params.prompt_logprobs_from)
        blocks = []
        for index in range(limit // self.block_size):
            block = self._block_of.get(self._block_hash(seq, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_hold(self, seq: Sequence, leaving: Collection[Sequence] = ()) -> bool:
        """Whether blocks suffice for all tokens of a waiting `seq`, with what is cached of them, once the running
        sequences `leaving` have given theirs back."""
        counts = Counter(block for other in leaving for block in other.block_table)
        freed = {block for block, count in counts.items() if count == self._ref_counts[block]}
        shared = self.match_prefix(seq)
        num_revived = sum(1 for block in shared if self._ref_counts[block] == 0 or block in freed)
        num_new = self.num_blocks_for(seq.num_tokens) - len(shared)
        return num_new + num_revived <= len(self._free) + len(freed)

    def share(self, seq: Sequence, blocks: list[int]) -> None:
        """Start the block table of `seq` with cached blocks; its counter moves past them."""
        assert not seq.block_table, "only a sequence without blocks can start from a prefix"
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        seq.block_table = list(blocks)
        seq.num_committed_blocks = len(blocks)
        seq.num_computed_tokens = len(blocks) * self.block_size

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend the block table of `seq` to hold `num_tokens`; False and nothing changed when blocks run out."""
        missing = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            stale = self._hash_of[block]
            if stale is not None:
                del self._block_of[stale]
                self._hash_of[block] = None
            self._ref_counts[block] = 1
            seq.block_table.append(block)
        return True

    def commit(self, seq: Sequence) -> None:
        """Offer the blocks that `num_computed_tokens` has filled to later sequences. Call only after a step that
        succeeded: a block of a failed step may hold anything."""
        num_full = seq.num_computed_tokens // self.block_size
        for index in range(seq.num_committed_blocks, num_full):
            block_hash = self._block_hash(seq, index)
            if block_hash not in self._block_of:
                block = seq.block_table[index]
                self._block_of[block_hash] = block
                self._hash_of[block] = block_hash
        seq.num_committed_blocks = max(seq.num_committed_blocks, num_full)

    def free(self, seq: Sequence) -> None:
        """Give back the blocks of `seq`. The tail goes first, so that beginnings stay shareable longest."""
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)
        seq.block_table = []
        seq.num_committed_blocks = 0
        seq.num_computed_tokens = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless free and referenced blocks are all blocks and hashes map back."""
        counts = [0] * self.num_blocks
        owner_of: dict[int, tuple] = {}
        for seq in sequences:
            assert len(set(seq.block_table)) == len(seq.block_table), f"{seq} holds a block twice"
            needed = self.num_blocks_for(seq.num_computed_tokens)
            assert len(seq.block_table) >= needed, f"{seq} has computed more than its blocks hold"
            for index, block in enumerate(seq.block_table):
                counts[block] += 1
                tokens = tuple(seq.token_ids[: (index + 1) * self.block_size])
                identity = (seq.request.composition, seq.request.salt, tokens)
                assert owner_of.setdefault(block, identity) == identity, f"block {block} is shared by unequal sequences"
        assert counts == self._ref_counts, "reference counts differ from the block tables"
        assert set(self._free) == {block for block in range(self.num_blocks) if counts[block] == 0}, "free list is off"
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash, f"block {block} does not carry the hash it is filed under"
        assert len(self._block_of) == sum(h is not None for h in self._hash_of), "a hash is filed nowhere"

    def _block_hash(self, seq: Sequence, index: int) -> bytes:
        hashes = seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            tokens = array("q", seq.token_ids[start : start + self.block_size])
            parent = hashes[-1] if hashes else root_hash(seq.request.composition, seq.request.salt)
            hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return hashes[index]


def root_hash(composition: Composition, salt: bytes) -> bytes:
    """The start of the hash chain: whose keys and values these are."""
    digest = hashlib.sha256()
    for part in (*(f"{use.digest}*{use.scale!r}".encode() for use in composition), salt):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
