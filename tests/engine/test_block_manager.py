"""Blocks: a state machine against a model of every block's content, and the rules of sharing one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduler_rig import make_sequence, uses

from loraplex.engine.block_manager import BlockManager, root_hash
from loraplex.engine.sequence import Sequence

SIZE = 4


def admit(blocks: BlockManager, seq: Sequence) -> list[int]:
    """As the scheduler does it; returns the shared blocks."""
    shared = blocks.match_prefix(seq)
    assert blocks.can_hold(seq)
    blocks.share(seq, shared)
    assert blocks.grow(seq, seq.num_tokens)
    return shared


def compute(blocks: BlockManager, seq: Sequence) -> None:
    seq.num_computed_tokens = seq.num_tokens
    blocks.commit(seq)


def run(blocks: BlockManager, tokens, composition=(), salt: bytes = b"", **params) -> int:
    """Admit, compute and free one sequence; how many tokens it found."""
    seq = make_sequence("s", tokens, composition, salt=salt, **params)
    num_cached = len(admit(blocks, seq)) * SIZE
    compute(blocks, seq)
    blocks.free(seq)
    return num_cached


# -- identity -------------------------------------------------------------------------------------------------------


def test_the_root_depends_on_every_part():
    roots = [
        root_hash(*args)
        for args in (
            ((), b""),
            ((), b"salt"),
            (uses("a"), b""),
            (uses("a"), b"salt"),
            (uses("a", scale=0.5), b""),
            (uses("b"), b""),
            (uses("a", "b"), b""),
            (uses("b", "a"), b""),
            (uses("ab"), b""),
            ((), b"a*1.0"),
        )
    ]
    assert len(set(roots)) == len(roots)


@pytest.mark.parametrize(
    "other",
    [
        {"composition": uses("b")},
        {"composition": ()},
        {"composition": uses("a", scale=0.5)},
        {"composition": uses("a", "b")},
        {"salt": b"another"},
        {"tokens": [9, *range(1, 20)]},
        {"tokens": [0, 1, 2, 9, *range(4, 20)]},
    ],
    ids=str,
)
def test_what_differs_shares_nothing(other: dict):
    blocks = BlockManager(64, SIZE)
    same = {"tokens": list(range(20)), "composition": uses("a"), "salt": b"one"}
    run(blocks, **same)
    assert run(blocks, **same) == 16
    assert run(blocks, **(same | other)) == 0


def test_equal_beginnings_are_shared_up_to_the_first_difference():
    blocks = BlockManager(64, SIZE)
    run(blocks, range(20))
    assert run(blocks, [*range(10), 99, *range(11, 20)]) == 8


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_a_prompt_is_never_found_whole(length: int):
    """One token is left to compute: its logits give the first output."""
    blocks = BlockManager(64, SIZE)
    run(blocks, range(length))
    assert run(blocks, range(length)) == (length - 1) // SIZE * SIZE < length


def test_a_request_for_the_prompts_logprobs_reads_nothing_but_is_read():
    blocks = BlockManager(64, SIZE)
    run(blocks, range(20))
    assert run(blocks, range(20), prompt_logprobs=0) == 0
    fresh = BlockManager(64, SIZE)
    run(fresh, range(20), prompt_logprobs=0)
    assert run(fresh, range(20)) == 16


def test_nothing_is_found_before_it_was_committed():
    """Blocks of a failed step hold anything: they are offered only after `commit`."""
    blocks = BlockManager(64, SIZE)
    seq = make_sequence("failed", range(20))
    admit(blocks, seq)
    seq.num_computed_tokens = 20
    blocks.free(seq)
    assert run(blocks, range(20)) == 0


def test_generated_tokens_are_found_after_a_preemption():
    blocks = BlockManager(64, SIZE)
    seq = make_sequence("s", range(6))
    admit(blocks, seq)
    compute(blocks, seq)
    for token in range(50, 60):
        seq.token_ids.append(token)
        assert blocks.grow(seq, seq.num_tokens)
        compute(blocks, seq)
    blocks.free(seq)
    assert seq.num_computed_tokens == 0
    assert len(admit(blocks, seq)) == 3
    assert run(blocks, [*range(6), 50, 51, 52, 53, 99, 99, 99]) == 8


# -- the order in which blocks are given away -----------------------------------------------------------------------


def test_the_least_recently_freed_is_overwritten_first_and_its_end_before_its_beginning():
    blocks = BlockManager(8, SIZE)
    run(blocks, range(100, 112))  # 3 blocks
    run(blocks, range(200, 212))
    run(blocks, range(300, 308))  # the two that never held anything
    run(blocks, range(400, 404))  # 1 block: the tail of the first
    assert run(blocks, range(300, 312), max_tokens=1) == 8
    blocks = BlockManager(6, SIZE)
    run(blocks, range(100, 112))
    run(blocks, range(200, 212))
    run(blocks, range(100, 112))  # used again: now the second is the oldest
    run(blocks, range(400, 404))
    seq = make_sequence("s", range(200, 213))
    assert len(blocks.match_prefix(seq)) == 2, "only the tail of the second is gone"
    assert len(blocks.match_prefix(make_sequence("s", range(100, 113)))) == 3


def test_blocks_without_content_are_given_away_before_cached_ones():
    blocks = BlockManager(4, SIZE)
    run(blocks, range(8))
    other = make_sequence("s", range(100, 106))
    admit(blocks, other)
    blocks.free(other)  # never committed
    run(blocks, range(100, 106))
    assert run(blocks, range(8)) == 4


def test_revived_blocks_are_not_counted_as_free():
    """A cached block that is free itself cannot be both shared and given away."""
    blocks = BlockManager(4, SIZE)
    run(blocks, range(12))
    long = make_sequence("s", [*range(12), *range(50, 54)])
    assert blocks.can_hold(long)
    holder = make_sequence("h", range(200, 204))
    admit(blocks, holder)
    assert not blocks.can_hold(long)
    assert blocks.can_hold(long, [holder])
    assert not blocks.grow(holder, 20)
    assert len(holder.block_table) == 1, "nothing was taken"


def test_a_shared_block_is_free_only_when_all_its_users_leave():
    blocks = BlockManager(6, SIZE)
    first, second = make_sequence("a", range(9)), make_sequence("b", range(9))
    admit(blocks, first)
    compute(blocks, first)
    assert len(admit(blocks, second)) == 2
    compute(blocks, second)
    big = make_sequence("c", range(100, 116))
    assert not blocks.can_hold(big, [first])
    assert blocks.can_hold(big, [first, second])
    blocks.check_integrity([first, second])


@pytest.mark.parametrize("fault", ["ref", "free", "hash", "shared"])
def test_integrity_notices(fault: str):
    blocks = BlockManager(8, SIZE)
    a, b = make_sequence("a", range(9)), make_sequence("b", range(100, 109))
    for seq in (a, b):
        admit(blocks, seq)
        compute(blocks, seq)
    blocks.check_integrity([a, b])
    match fault:
        case "ref":
            blocks._ref_counts[a.block_table[0]] += 1
        case "free":
            blocks._free.popitem()
        case "hash":
            blocks._hash_of[a.block_table[0]] = b"other"
        case "shared":
            b.block_table[0] = a.block_table[0]
    with pytest.raises(AssertionError):
        blocks.check_integrity([a, b])


# -- everything at once ---------------------------------------------------------------------------------------------


class BlockMachine(RuleBasedStateMachine):
    """The model writes into every slot which (composition, salt, tokens so far) stands there."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(12, SIZE)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.content: dict[int, tuple] = {}
        self.count = 0

    def identity(self, seq: Sequence, length: int) -> tuple:
        return seq.request.composition, seq.request.salt, tuple(seq.token_ids[:length])

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        composition=st.sampled_from([(), uses("a"), uses("a", scale=2.0), uses("a", "b"), uses("b", "a")]),
        salt=st.sampled_from([b"", b"t"]),
        echo=st.booleans(),
    )
    def arrive(self, tokens, composition, salt, echo):
        self.count += 1
        params = {"prompt_logprobs": 0} if echo else {}
        self.waiting.append(make_sequence(str(self.count), tokens, composition, salt=salt, **params))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data):
        seq = self.waiting[data.draw(st.integers(0, len(self.waiting) - 1))]
        leaving = [other for other in self.running if data.draw(st.booleans())]
        before = self.blocks.num_free_blocks
        if not self.blocks.can_hold(seq, leaving):
            return
        for other in leaving:
            self.preempt_one(other)
        shared = admit(self.blocks, seq)
        assert len(shared) * SIZE < seq.num_tokens
        assert not (shared and seq.wants_prompt_logprobs)
        assert seq.num_computed_tokens == len(shared) * SIZE
        if not leaving:
            assert before - self.blocks.num_free_blocks <= self.blocks.num_blocks_for(seq.num_tokens)
        for position in range(seq.num_computed_tokens):
            slot = seq.block_table[position // SIZE] * SIZE + position % SIZE
            assert self.content[slot] == self.identity(seq, position + 1), "a shared block holds something else"
        self.waiting.remove(seq)
        self.running.append(seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 10), fails=st.booleans())
    def step(self, data, num_tokens, fails):
        seq = data.draw(st.sampled_from(self.running))
        end = min(seq.num_tokens, seq.num_computed_tokens + num_tokens)
        for position in range(seq.num_computed_tokens, end):
            slot = seq.block_table[position // SIZE] * SIZE + position % SIZE
            self.content[slot] = ("garbage",) if fails else self.identity(seq, position + 1)
        if fails:
            self.running.remove(seq)
            self.blocks.free(seq)
            return
        seq.num_computed_tokens = end
        self.blocks.commit(seq)
        if end == seq.num_tokens:
            free, table = self.blocks.num_free_blocks, list(seq.block_table)
            if self.blocks.grow(seq, seq.num_tokens + 1):
                seq.token_ids.append(data.draw(st.integers(0, 1)))
            else:
                assert (self.blocks.num_free_blocks, seq.block_table) == (free, table), (
                    "a failed grow changed something"
                )

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data):
        self.preempt_one(data.draw(st.sampled_from(self.running)))

    def preempt_one(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.free(seq)
        self.waiting.append(seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        seq = data.draw(st.sampled_from(self.running))
        self.running.remove(seq)
        self.blocks.free(seq)

    @invariant()
    def integrity(self):
        self.blocks.check_integrity(self.running)
        held = {block for seq in self.running for block in seq.block_table}
        assert self.blocks.num_free_blocks == 12 - len(held)
        assert self.blocks.usage == pytest.approx(len(held) / 12)


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40)
