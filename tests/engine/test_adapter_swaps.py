"""Adapters that take steps to be copied to the device: who waits, who does not, what stays where meanwhile. The rig
checks at every step that no sequence runs whose adapter has not arrived, and that a copy's slab and place are left
alone."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_rig import Rig, uses

from loraplex.engine.messages import FinishReason


def warm(rig: Rig, *names: str) -> None:
    """Into RAM, out of the places as far as others need them."""
    for name in names:
        rig.add(f"warm {name}", uses(name), max_tokens=1)
    rig.run()
    rig.copies.started.clear()


def test_a_sequence_is_admitted_when_its_adapter_has_arrived():
    rig = Rig(copy_steps=3)
    rig.add("a", uses("x"), max_tokens=2)
    rig.steps(2)  # read from disk, the copy begins
    assert rig.copies.started == ["x"]
    assert rig.places.copying == {"x"}
    rig.steps(3)
    assert not rig.is_running("a")
    assert not rig.places.has_arrived("x")
    rig.step()
    assert rig.is_running("a")
    assert rig.places.arrived == ["x"]


def test_the_others_go_on_meanwhile():
    """No stream misses a step, and requests whose adapters are there are admitted past the one that waits."""
    rig = Rig(copy_steps=20)
    rig.add("base", max_tokens=40)
    rig.step()
    rig.add("a", uses("x"))
    rig.steps(3)
    rig.copies.steps = 0
    rig.add("b", uses("y"), max_tokens=3)
    rig.steps(10)
    assert len(rig.tokens["b"]) == 3
    assert rig.places.copying == {"x"}
    steps = rig.tokens["base"]
    assert steps == list(range(steps[0], steps[0] + len(steps)))


def test_copies_begin_for_the_queue_while_its_slots_are_taken():
    """Prefetch: when the slot is free, the adapter is there."""
    rig = Rig(copy_steps=2, max_num_seqs=1, fairness_quantum=1000)
    rig.add("base", max_tokens=12)
    for name in "xy":
        rig.add(name, uses(name), max_tokens=2)
    while not rig.ends:
        rig.step()
    assert rig.copies.started == ["x", "y"]
    assert rig.places.arrived == ["x", "y"]
    rig.step()
    assert rig.is_running("x")


def test_copies_are_limited():
    rig = Rig(copy_steps=2, max_loras=6, max_concurrent_copies=2, max_concurrent_loads=8)
    for name in "abcdef":
        rig.add(name, uses(name), max_tokens=2)
    rig.steps(2)
    assert rig.copies.started == ["a", "b"]
    rig.run()
    assert sorted(rig.copies.started) == list("abcdef")


def test_look_ahead_takes_no_place_of_what_is_needed_sooner():
    """Two places: the first two of the queue have them until they run, whatever waits behind."""
    rig = Rig(copy_steps=1, max_loras=2, max_num_seqs=1, fairness_quantum=1000)
    warm(rig, *"abcdef")
    rig.add("base", max_tokens=30)
    rig.step()
    for name in "abcdef":
        rig.add(name, uses(name), max_tokens=2)
    rig.steps(20)
    assert rig.copies.started == ["a", "b"]
    rig.run()
    assert rig.copies.started == list("abcdef"), "nothing was copied twice"


def test_an_abort_leaves_the_copy_to_end():
    """The adapter then stands in its place for the next who asks."""
    rig = Rig(copy_steps=4)
    rig.add("a", uses("x"))
    rig.steps(2)
    rig.abort("a")
    rig.scheduler.check_integrity()
    assert rig.cache.num_leases("x") == 1
    rig.steps(5)
    assert rig.cache.num_leases("x") == 0
    assert rig.places.arrived == ["x"]
    rig.add("b", uses("x"), max_tokens=1)
    rig.step()
    assert rig.ends["b"].finish_reason is FinishReason.LENGTH
    assert rig.copies.started == ["x"]


def test_a_slab_stays_in_ram_while_it_is_copied():
    """Also when the room is wanted for another, and by hand."""
    rig = Rig(copy_steps=6, adapter_cache_bytes=1, fairness_quantum=2)
    rig.add("a", uses("x"))
    rig.steps(2)
    rig.abort("a")
    rig.add("b", uses("y"), max_tokens=2)
    rig.steps(4)
    assert "x" in rig.cache
    assert rig.loads.started == ["x"]
    with pytest.raises(ValueError, match="in use"):
        rig.cache.evict("x")
    with pytest.raises(ValueError, match="being copied"):
        rig.places.release("x")
    rig.run()
    assert rig.loads.started == ["x", "y"]
    assert rig.scheduler.num_preemptions == 0


def test_a_copy_is_no_use_of_the_adapter():
    rig = Rig(copy_steps=1)
    rig.add("a", uses("x"), max_tokens=1)
    rig.run()
    assert rig.cache.ledger.look("x").uses == 1


def test_nobody_is_turned_out_of_ram_for_room_that_a_copy_holds():
    """An overdue adapter lacks RAM; what is being copied is leased by nobody who runs, and is no room yet."""
    rig = Rig(copy_steps=30, adapter_cache_bytes=2, fairness_quantum=3, max_loras=2)
    rig.copies.steps = 0
    rig.add("a", uses("a"), max_tokens=60)
    rig.steps(3)
    rig.copies.steps = 30
    rig.add("b", uses("b", nbytes=1), max_tokens=2)
    rig.steps(2)
    assert rig.places.copying == {"b"}
    rig.abort("b")
    rig.add("c", uses("c", nbytes=2), max_tokens=2)
    rig.steps(20)
    assert rig.scheduler.num_preemptions == 0
    assert rig.is_running("a")
    rig.run()
    assert rig.ends["c"].finish_reason is FinishReason.LENGTH


def test_a_failed_copy_ends_those_that_wait_for_it_and_no_others():
    rig = Rig(copy_steps=2, max_loras=4, max_concurrent_loads=4)
    rig.copies.broken = {"x"}
    for name, composition in (("x", uses("x")), ("xy", uses("y", "x")), ("y", uses("y")), ("base", ())):
        rig.add(name, composition)
    rig.run()
    assert {name: end.finish_reason for name, end in rig.ends.items()} == {
        "x": FinishReason.ERROR,
        "xy": FinishReason.ERROR,
        "y": FinishReason.LENGTH,
        "base": FinishReason.LENGTH,
    }
    assert rig.ends["x"].failure is not None
    assert "x" in rig.cache, "RAM has it still"
    assert "x" not in rig.places
    rig.copies.broken.clear()
    rig.add("again", uses("x"), max_tokens=2)
    rig.run()
    assert rig.ends["again"].finish_reason is FinishReason.LENGTH


def test_an_overdue_adapter_turns_out_one_whose_turn_is_over_once():
    """And has its place until it runs, although others wait for one, too."""
    rig = Rig(copy_steps=5, max_loras=1, fairness_quantum=4, max_num_seqs=2)
    warm(rig, "x", "y")
    rig.add("x", uses("x"), max_tokens=60)
    while not rig.is_running("x"):
        rig.step()
    rig.add("y", uses("y"), max_tokens=3)
    arrival = rig.step_number
    while "y" not in rig.admitted:
        rig.step()
    assert rig.scheduler.num_preemptions == 1
    assert rig.admitted["y"] - arrival <= 2 * 4 + 5 + 2
    rig.run()
    assert len(rig.tokens["x"]) == 60


def test_a_composition_takes_all_its_places_at_once():
    """Two compositions that overlap nowhere, and places for one: no place is held for half of one."""
    rig = Rig(copy_steps=2, max_loras=3, fairness_quantum=3)
    for name, adapters in (("ab", "ab"), ("cd", "cd"), ("ef", "ef")):
        rig.add(name, uses(*adapters), max_tokens=5)
    rig.run()
    assert all(end.finish_reason is FinishReason.LENGTH for end in rig.ends.values())


def test_an_overdue_adapter_takes_no_place_that_an_earlier_one_waits_to_use():
    """A composition gets its two places one after the other; who is overdue behind it must not take the first."""
    rig = Rig(copy_steps=0, max_loras=2, max_concurrent_copies=1, fairness_quantum=1)
    warm(rig, "a", "b", "c")
    rig.copies.steps = 2
    for name, adapters in (("a", "a"), ("cb", "cb"), ("b", "b"), ("ac", "ac")):
        rig.add(name, uses(*adapters), max_tokens=6)
    rig.run()
    assert all(end.finish_reason is FinishReason.LENGTH for end in rig.ends.values())


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    places=st.integers(1, 4),
    copy_steps=st.integers(0, 6),
    concurrent=st.integers(1, 4),
    quantum=st.sampled_from([1, 4, 12]),
    ram=st.integers(4, 12),
)
def test_whatever_comes_and_goes_everything_ends(
    seed: int, places: int, copy_steps: int, concurrent: int, quantum: int, ram: int
):
    """Random traffic with aborts, broken copies, compositions, pressure on RAM, places, slots and blocks; the rig
    checks the invariants at every step."""
    rng = random.Random(seed)
    rig = Rig(
        copy_steps=copy_steps, max_loras=places, max_concurrent_copies=concurrent, fairness_quantum=quantum,
        adapter_cache_bytes=ram, max_num_seqs=rng.randint(1, 6), num_blocks=rng.choice([32, 64]),
        load_steps=rng.randint(0, 3),
    )  # fmt: skip
    names = "abcdefgh"
    rig.copies.broken = set(rng.sample(names, rng.randint(0, 1)))
    for _ in range(40):
        for _ in range(rng.randint(0, 2)):
            count = rng.choice([0, 1, 1, 1, min(2, places)])
            composition = uses(*rng.sample(names, count))
            rig.add(f"s{len(rig.seqs)}", composition, prompt=rng.randint(1, 40), max_tokens=rng.randint(1, 20))
        if rng.random() < 0.2 and rig.seqs:
            rig.abort(rng.choice(list(rig.seqs)))
        rig.copies.steps = rng.randint(0, copy_steps)
        rig.step()
    rig.run()
    for seq_id, end in rig.ends.items():
        broken = rig.copies.broken & set(rig.seqs[seq_id].digests)
        assert end.finish_reason is not FinishReason.ERROR or broken, end
    rig.steps(copy_steps + 1)
    assert not rig.places.copying
    assert not rig.cache.leased


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    quantum=st.sampled_from([3, 8, 20]),
    places=st.integers(1, 4),
    others=st.integers(1, 10),
    copy_steps=st.integers(0, 3),
)
def test_nobody_starves(seed: int, quantum: int, places: int, others: int, copy_steps: int):
    """A flood on as many adapters as there are places; the others are in RAM. The scheduler's bound, and in every turn
    the time of a copy."""
    rng = random.Random(seed)
    rig = Rig(
        copy_steps=copy_steps, max_loras=places, fairness_quantum=quantum, max_num_seqs=16, check=False,
        max_num_batched_tokens=256, adapter_cache_bytes=1000, num_blocks=1024, max_concurrent_loads=64,
    )  # fmt: skip
    victims = [f"v{i}" for i in range(others)]
    warm(rig, *victims)

    def flood() -> None:
        for name in "abcd"[:places]:
            alive = sum(1 for s in rig.scheduler.sequences if s.seq_id.startswith(f"{name}/"))
            for _ in range(6 - alive):
                rig.add(f"{name}/{len(rig.seqs)}", uses(name), prompt=rng.randint(1, 10), max_tokens=rng.randint(1, 60))

    for _ in range(rng.randrange(10, 40)):
        flood()
        rig.step()
    arrival = rig.step_number
    for name in victims:
        rig.add(name, uses(name), max_tokens=rng.choice([1, 50]))
    bound = ((others - 1 + places) // places + 2) * (quantum + copy_steps + 2)
    while any(name not in rig.admitted for name in victims):
        flood()
        rig.step()
        assert rig.step_number - arrival <= bound, f"{[n for n in victims if n not in rig.admitted]} starve"
