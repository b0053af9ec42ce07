"""The scheduler step by step: order, budget, chunks, admission, preemption, loads, aborts. Pure Python."""

import subprocess
import sys
from pathlib import Path

import pytest
from scheduler_rig import Rig, uses

from loraplex.engine.messages import Failure, FinishReason
from loraplex.engine.scheduled_batch import RowResult

ROOT = Path(__file__).parents[2]


def test_this_file_needs_no_torch():
    code = "import sys, scheduler_rig; assert 'torch' not in sys.modules"
    paths = f"{ROOT / 'server'}:{ROOT / 'tests' / 'engine'}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": paths}, timeout=120)


# -- tokens ---------------------------------------------------------------------------------------------------------


def tokens_of(batch) -> dict[str, int]:
    return {entry.seq.seq_id: entry.num_new_tokens for entry in batch.entries}


def test_decodes_come_before_prompt_chunks():
    rig = Rig(max_num_batched_tokens=10, max_num_seqs=4)
    rig.add("short", prompt=3, max_tokens=20)
    rig.step()
    rig.add("long", prompt=40, max_tokens=4)
    rig.add("later", prompt=2, max_tokens=4)
    assert tokens_of(rig.step()) == {"short": 1, "long": 9}
    assert tokens_of(rig.step()) == {"short": 1, "long": 9}
    rig.steps(2)
    assert rig.seqs["long"].num_computed_tokens == 36
    assert tokens_of(rig.step()) == {"short": 1, "long": 4, "later": 2}
    assert [len(rig.tokens[name]) for name in ("short", "long", "later")] == [6, 1, 1]


def test_a_prompt_is_cut_to_the_budget_and_its_token_comes_with_the_last_chunk():
    rig = Rig(max_num_batched_tokens=8)
    rig.add("a", prompt=20, max_tokens=2)
    assert [tokens_of(rig.step())["a"] for _ in range(4)] == [8, 8, 4, 1]
    assert rig.tokens["a"] == [3, 4]
    assert rig.ends["a"].finish_reason is FinishReason.LENGTH


def test_max_tokens_zero_ends_after_the_prompt_without_a_token():
    rig = Rig(max_num_batched_tokens=8)
    rig.add("a", prompt=20, max_tokens=0)
    rig.run()
    assert not rig.tokens["a"]
    assert rig.ends["a"].finish_reason is FinishReason.LENGTH
    assert rig.step_number == 3


def test_a_sequence_of_exactly_max_model_len():
    rig = Rig(max_model_len=32, num_blocks=8)
    rig.add("a", prompt=24, max_tokens=8)
    rig.add("b", prompt=32, max_tokens=0)
    rig.run()
    assert len(rig.tokens["a"]) == 8
    assert rig.ends["b"].finish_reason is FinishReason.LENGTH
    assert rig.blocks.num_free_blocks == 8


def test_one_adapters_tokens_are_neighbours_and_one_compositions_too():
    rig = Rig(max_num_seqs=12, max_loras=2)
    for i in range(9):
        rig.add(f"s{i}", uses("ab"[i % 2], scale=(1.0, 0.5, 2.0)[i % 3]))
    rig.add("base")
    rig.step()
    order = [entry.seq.request.composition for entry in rig.step().entries]
    changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert changes == len(set(order)) - 1, "a composition stands in two parts"
    assert order[0] == ()


# -- admission ------------------------------------------------------------------------------------------------------


def test_admission_takes_every_lease_place_and_block_at_once():
    rig = Rig()
    rig.add("a", uses("x", "y"), prompt=60)
    rig.steps(2)
    seq = rig.seqs["a"]
    assert [rig.cache.num_leases(digest) for digest in "xy"] == [1, 1]
    assert "x" in rig.places
    assert "y" in rig.places
    assert len(seq.block_table) == 15, "blocks for the whole prompt, not for the chunk"
    assert seq.num_computed_tokens == 32


@pytest.mark.parametrize("lacking", ["places", "blocks", "slots", "ram"])
def test_what_lacks_something_takes_nothing(lacking: str):
    sizes = {"places": {"max_loras": 2}, "blocks": {"num_blocks": 32}, "slots": {"max_num_seqs": 1}}
    sizes["ram"] = {"adapter_cache_bytes": 2}
    rig = Rig(**sizes[lacking])
    rig.add("first", uses("a"), prompt=100, max_tokens=20)
    rig.steps(5)
    assert rig.is_running("first")
    rig.add("second", uses("b", "c"), prompt=30)
    for _ in range(3):
        rig.step()
        assert not rig.is_running("second")
        assert rig.cache.leased == {"a"}
        assert not rig.seqs["second"].block_table
    rig.run()
    assert len(rig.tokens["second"]) == 8


def test_as_many_adapters_as_places_and_shared_ones():
    rig = Rig(max_loras=3, adapter_cache_bytes=3)
    rig.add("abc", uses("a", "b", "c"))
    rig.add("cba", uses("c", "b", "a"))
    rig.add("ad", uses("a", "d"))
    rig.add("a", uses("a"))
    rig.add("a half", uses("a", scale=0.5))
    rig.run()
    assert all(len(tokens) == 8 for tokens in rig.tokens.values())


def test_a_composition_does_not_evict_its_own_parts():
    """Room for a missing part is not taken from a part that is resident."""
    rig = Rig(adapter_cache_bytes=3, max_loras=3)
    for name in "byz":  # b is the least recently used
        rig.add(name, uses(name), max_tokens=1)
        rig.run()
    rig.loads.started.clear()
    rig.add("ab", uses("a", "b"))
    rig.run()
    assert rig.loads.started == ["a"]


# -- KV blocks and preemption ---------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_resumes_where_it_was():
    rig = Rig(num_blocks=32, max_model_len=128, fairness_quantum=1000)
    rig.add("old", prompt=50, max_tokens=40)
    rig.step()
    rig.add("young", prompt=50, max_tokens=40)
    rig.run()
    assert rig.scheduler.num_preemptions >= 1
    assert len(rig.tokens["old"]) == len(rig.tokens["young"]) == 40
    assert max(b - a for a, b in zip(rig.tokens["old"], rig.tokens["old"][1:], strict=False)) == 1
    assert rig.seqs["young"].num_cached_tokens == 0, "usage tells of the first admission, not of a resumption"


def test_preempted_ones_wait_in_the_order_of_their_arrival():
    rig = Rig(max_loras=1, fairness_quantum=4, max_num_batched_tokens=64)
    for i in range(4):
        rig.add(f"a{i}", uses("a"), max_tokens=50)
    rig.steps(2)
    rig.add("b", uses("b"), max_tokens=50)
    while not rig.is_running("b"):
        rig.step()
    assert [seq.seq_id for seq in rig.scheduler.waiting] == ["a0", "a1", "a2", "a3"]


def test_a_turn_that_brought_no_token_is_given_back_in_full():
    """Two prompts that need longer than a quantum and cannot be in the cache together: both get on."""
    rig = Rig(max_num_batched_tokens=4, max_num_seqs=2, num_blocks=32, max_model_len=128, fairness_quantum=5)
    rig.add("a", uses("a"), prompt=100, max_tokens=20)
    rig.add("b", uses("b"), prompt=100, max_tokens=20)
    rig.run(600)
    assert len(rig.tokens["a"]) == len(rig.tokens["b"]) == 20


def test_a_prompt_under_way_gives_its_blocks_to_nobody():
    """Blocks are taken for the whole prompt: decodes that grow meanwhile preempt the youngest, not the plan."""
    rig = Rig(max_num_batched_tokens=6, max_num_seqs=4, num_blocks=32, max_model_len=128, fairness_quantum=1000)
    for i in range(3):
        rig.add(f"s{i}", prompt=2, max_tokens=30)
    rig.steps(2)
    rig.add("long", prompt=100, max_tokens=2)
    rig.run(500)
    assert [len(rig.tokens[name]) for name in ("s0", "s1", "s2", "long")] == [30, 30, 30, 2]


def test_a_failed_step_gives_back_places_that_may_not_have_been_filled():
    """The pool may have failed while it loaded: the next user must load the adapter again, never run without it."""
    rig = Rig()
    rig.add("a", uses("x"))
    rig.step()
    rig.take_loads()
    batch = rig.scheduler.schedule()
    assert [weights.digest for _, weights in batch.adapter_loads] == ["x"]
    outputs = rig.scheduler.fail(batch, Failure("code", "message"))
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    rig.scheduler.check_integrity()
    assert "x" not in rig.places
    rig.ends["a"] = outputs[0]
    rig.add("b", uses("x"))
    assert [weights.digest for _, weights in rig.step().adapter_loads] == ["x"]


def test_a_row_that_failed_ends_alone():
    rig = Rig()
    rig.add("good", prompt=4)
    rig.add("bad", prompt=4)
    batch = rig.scheduler.schedule()
    results = [
        RowResult(failure=Failure("non_finite_logits", "")) if entry.seq.seq_id == "bad" else RowResult(7)
        for entry in batch.entries
    ]
    outputs = {output.seq_id: output for output in rig.scheduler.update(batch, results)}
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert outputs["good"].token_id == 7
    rig.scheduler.check_integrity()
    assert [seq.seq_id for seq in rig.scheduler.running] == ["good"]


# -- loads ----------------------------------------------------------------------------------------------------------


def test_loads_are_single_flight_and_limited():
    rig = Rig(load_steps=3)
    for i in range(12):
        rig.add(f"s{i}", uses("abcd"[i % 4]))
    rig.step()
    assert rig.loads.started == ["a", "b"]
    rig.run()
    assert sorted(rig.loads.started) == ["a", "b", "c", "d"]


def test_look_ahead_evicts_nothing_that_is_needed_sooner():
    rig = Rig(adapter_cache_bytes=4, max_loras=2, max_num_seqs=2, fairness_quantum=1000)
    rig.add("a", uses("a"), max_tokens=30)
    rig.add("b", uses("b"), max_tokens=30)
    rig.steps(2)
    for name in "cdefg":
        rig.add(name, uses(name), max_tokens=2)
    rig.steps(10)
    assert rig.loads.started == list("abcd"), "two wait in RAM, the others on disk"
    rig.run()
    assert rig.loads.started == list("abcdefg"), "nothing was loaded twice"


def test_a_failed_load_ends_those_that_wait_for_it_and_no_others():
    rig = Rig(load_steps=2)
    rig.loads.broken = {"x"}
    for name, composition in (("x", uses("x")), ("xy", uses("y", "x")), ("y", uses("y")), ("base", ())):
        rig.add(name, composition)
    rig.run()
    assert {name: end.finish_reason for name, end in rig.ends.items()} == {
        "x": FinishReason.ERROR,
        "xy": FinishReason.ERROR,
        "y": FinishReason.LENGTH,
        "base": FinishReason.LENGTH,
    }
    assert rig.ends["x"].failure == Failure("adapter_load_failed", "broken")
    assert rig.cache.reserved_bytes == 0


def test_an_adapter_larger_than_its_record_is_not_taken_in():
    rig = Rig(load_steps=1)
    rig.add("a", uses("x", nbytes=2))
    rig.bytes_of["x"] = 3
    rig.run()
    assert rig.ends["a"].finish_reason is FinishReason.ERROR
    assert "x" not in rig.cache
    assert rig.cache.reserved_bytes == 0


def test_a_slow_load_preempts_nobody():
    """While a load is under way its line is overdue, but nothing is in its way: whoever runs goes on."""
    rig = Rig(fairness_quantum=3, max_loras=2, adapter_cache_bytes=2)
    rig.loads.steps["slow"] = 60
    rig.add("a", uses("a"), max_tokens=100)
    rig.steps(2)
    rig.add("slow", uses("slow"), max_tokens=2)
    rig.steps(55)
    assert rig.scheduler.num_preemptions == 0
    assert len(rig.tokens["a"]) > 50


def test_a_slow_load_that_needed_room_preempts_once():
    rig = Rig(fairness_quantum=3, max_loras=2, adapter_cache_bytes=2)
    rig.loads.steps["slow"] = 100
    rig.add("a", uses("a"), max_tokens=100)
    rig.add("b", uses("b"), max_tokens=100)
    rig.steps(4)
    rig.add("slow", uses("slow"), max_tokens=2)
    while rig.scheduler.num_preemptions == 0:
        rig.step()
    gone, stays = ("b", "a") if rig.is_running("a") else ("a", "b")
    rig.abort(gone)
    rig.steps(60)
    assert "slow" in rig.loads.under_way
    assert rig.scheduler.num_preemptions == 1, "a line that is only loading turns nobody out again"
    assert rig.is_running(stays)


# -- pins -----------------------------------------------------------------------------------------------------------


def test_pinned_adapters_that_fill_the_ram_refuse_what_can_never_fit():
    rig = Rig(adapter_cache_bytes=3)
    for name in "abc":
        rig.add(name, uses(name), max_tokens=1)
        rig.cache.pin(name)
    rig.run()
    rig.add("d", uses("d"))
    rig.add("ad", uses("a", "d"))
    rig.add("ab", uses("a", "b"))
    rig.add("base")
    rig.run(40)
    for name in ("d", "ad"):
        failure = rig.ends[name].failure
        assert failure is not None
        assert failure.code == "adapter_too_large"
        assert "Unpin" in failure.message
    assert rig.ends["ab"].finish_reason is rig.ends["base"].finish_reason is FinishReason.LENGTH


def test_a_pin_that_comes_later_ends_what_waits():
    rig = Rig(adapter_cache_bytes=2, fairness_quantum=1000)
    rig.add("a", uses("a"), max_tokens=60)
    rig.steps(2)
    rig.add("bc", uses("b", "c"))
    rig.steps(3)
    rig.cache.pin("a")
    rig.run(80)
    assert rig.ends["bc"].finish_reason is FinishReason.ERROR
    assert len(rig.tokens["a"]) == 60


@pytest.mark.parametrize("ram", [1, 2, 3])
def test_ram_for_fewer_adapters_than_places(ram: int):
    rig = Rig(adapter_cache_bytes=ram, max_loras=6, load_steps=1)
    for i in range(20):
        rig.add(f"s{i}", uses(f"x{i % 9}"), max_tokens=12)
    rig.run()
    assert all(len(tokens) == 12 for tokens in rig.tokens.values())


# -- abort ----------------------------------------------------------------------------------------------------------


def test_abort_in_every_state():
    rig = Rig(max_num_batched_tokens=8, max_num_seqs=3, load_steps=3, num_blocks=32, fairness_quantum=4)
    rig.add("decoding", prompt=2, max_tokens=60)
    rig.add("loading", uses("x"))
    rig.step()
    rig.add("chunked", prompt=90)
    rig.add("waiting", prompt=4)
    rig.steps(2)
    assert 0 < rig.seqs["chunked"].num_computed_tokens < 90
    for name in ("loading", "chunked", "waiting", "decoding"):
        rig.abort(name)
        rig.scheduler.check_integrity()
    rig.steps(5)
    assert not rig.scheduler.sequences
    assert not rig.loads.under_way
    assert "x" in rig.cache, "its load ended after it"
    assert not rig.cache.leased
    assert rig.blocks.num_free_blocks == 32


def test_abort_of_a_preempted_one():
    rig = Rig(max_loras=1, fairness_quantum=2)
    rig.add("a", uses("a"), max_tokens=100)
    rig.steps(2)
    rig.add("b", uses("b"), max_tokens=100)
    while rig.is_running("a"):
        rig.step()
    rig.abort("a")
    rig.steps(10)
    assert rig.is_running("b")
    assert rig.scheduler.num_preemptions == 1, "nobody is left to make way for"
