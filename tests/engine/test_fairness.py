"""Nobody starves: the bounds that the scheduler's docstring states, over random floods, and no livelock at all."""

import random

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from scheduler_rig import Rig, uses


def examples(count: int) -> settings:
    return settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow])


def prompt_steps(rig: Rig, longest: int) -> int:
    """C of the docstring, at its worst: every slot's prompt is computed with what decodes leave of the budget."""
    config = rig.config
    return -(-longest * config.max_num_seqs // max(1, config.max_num_batched_tokens - config.max_num_seqs + 1))


def flood(rig: Rig, rng: random.Random, names: str, count: int, **shape) -> None:
    """Keep `count` sequences of each of these adapters alive ("-" is the base)."""
    for name in names:
        alive = sum(1 for s in rig.scheduler.sequences if s.seq_id.startswith(f"{name}/"))
        for _ in range(count - alive):
            prompt, output = (rng.randint(*shape[key]) for key in ("prompt", "output"))
            composition = () if name == "-" else uses(name)
            rig.add(f"{name}/{len(rig.seqs)}", composition, prompt=prompt, max_tokens=output)


def first_tokens(rig: Rig, rng: random.Random, names: str, victims: dict[str, dict], limit: int, **shape) -> dict:
    """Steps from the common arrival of `victims` under an endless flood to the first time each runs."""
    for _ in range(rng.randrange(10, 40)):
        flood(rig, rng, names, 6, **shape)
        rig.step()
    arrival = rig.step_number
    for name, request in victims.items():
        rig.add(name, **request)
    while any(name not in rig.admitted for name in victims):
        flood(rig, rng, names, 6, **shape)
        rig.step()
        assert rig.step_number - arrival <= limit, f"{[n for n in victims if n not in rig.admitted]} starve"
    return {name: rig.admitted[name] - arrival for name in victims}


@examples(25)
@given(
    seed=st.integers(0, 10**6),
    quantum=st.sampled_from([1, 3, 8, 20]),
    places=st.integers(1, 4),
    others=st.integers(1, 12),
    outputs=st.sampled_from([(1, 1), (1, 5), (30, 60)]),
)
def test_places(seed: int, quantum: int, places: int, others: int, outputs: tuple[int, int]):
    """A flood on as many adapters as there are places; the others are in RAM."""
    rng = random.Random(seed)
    rig = Rig(
        max_loras=places, fairness_quantum=quantum, max_num_seqs=16, max_num_batched_tokens=256, check=False,
        adapter_cache_bytes=1000, num_blocks=1024, max_concurrent_loads=64,
    )  # fmt: skip
    victims = {f"v{i}": {"composition": uses(f"v{i}"), "max_tokens": rng.choice([1, 50])} for i in range(others)}
    for name in victims:  # into RAM
        rig.add(f"warm {name}", uses(name), max_tokens=1)
    rig.run()
    names = "abcd"[:places]
    bound = ((others - 1 + places) // places + 2) * quantum
    waits = first_tokens(rig, rng, names, victims, bound + 1, prompt=(1, 10), output=outputs)
    note(f"{sorted(waits.values())} bound {bound}")
    for rank, wait in enumerate(sorted(waits.values())):
        assert wait <= ((rank + places) // places + 2) * quantum + 1


@examples(20)
@given(
    seed=st.integers(0, 10**6),
    quantum=st.sampled_from([1, 3, 8]),
    slots=st.integers(1, 6),
    others=st.integers(1, 10),
    outputs=st.sampled_from([(1, 1), (1, 5), (40, 60)]),
)
def test_slots(seed: int, quantum: int, slots: int, others: int, outputs: tuple[int, int]):
    """The base's flood holds every slot; so does an adapter's."""
    rng = random.Random(seed)
    rig = Rig(
        max_loras=16, fairness_quantum=quantum, max_num_seqs=slots, max_num_batched_tokens=64, check=False,
        adapter_cache_bytes=1000, num_blocks=1024, max_concurrent_loads=64,
    )  # fmt: skip
    victims: dict[str, dict] = {f"v{i}": {"composition": uses(f"v{i}"), "max_tokens": 50} for i in range(others)}
    victims["base"] = {"max_tokens": 50}
    for name in victims:
        rig.add(f"warm {name}", uses(name), max_tokens=1)
    rig.run()
    per_turn = quantum + prompt_steps(rig, 20)
    bound = (others // slots + 2) * per_turn
    waits = first_tokens(rig, rng, "ab", victims, bound + 1, prompt=(1, 20), output=outputs)
    note(f"{sorted(waits.values())} bound {bound}")


@examples(20)
@given(
    seed=st.integers(0, 10**6),
    quantum=st.sampled_from([1, 3, 8]),
    others=st.integers(1, 4),
    outputs=st.sampled_from([(1, 1), (1, 5), (40, 60)]),
    names=st.sampled_from(["-", "a", "-ab"]),
)
def test_blocks(seed: int, quantum: int, others: int, outputs: tuple[int, int], names: str):
    """Small sequences fill the KV cache for ever; prompts that need all of it come in, one after the other."""
    rng = random.Random(seed)
    rig = Rig(
        max_loras=16, fairness_quantum=quantum, max_num_seqs=8, max_num_batched_tokens=32, check=False,
        adapter_cache_bytes=1000, num_blocks=32, max_concurrent_loads=64,
    )  # fmt: skip
    victims = {
        f"v{i}": {"composition": uses(f"v{i}"), "prompt": 120, "max_tokens": 8, "prompt_logprobs": 0}
        for i in range(others)
    }
    for name in victims:
        rig.add(f"warm {name}", uses(name), max_tokens=1)
    rig.run()
    bound = (others + 1) * (quantum + prompt_steps(rig, 120))
    waits = first_tokens(rig, rng, names, victims, bound + 1, prompt=(1, 20), output=outputs)
    note(f"{sorted(waits.values())} bound {bound}")


@examples(15)
@given(seed=st.integers(0, 10**6), quantum=st.sampled_from([2, 8]), outputs=st.sampled_from([(1, 3), (40, 60)]))
def test_a_composition_that_needs_every_place(seed: int, quantum: int, outputs: tuple[int, int]):
    rng = random.Random(seed)
    rig = Rig(
        max_loras=3, fairness_quantum=quantum, max_num_batched_tokens=128, check=False, adapter_cache_bytes=1000,
        num_blocks=512, max_concurrent_loads=64,
    )  # fmt: skip
    victims = {"all": {"composition": uses("x", "y", "z")}, "two": {"composition": uses("a", "x")}}
    rig.add("warm", uses("x", "y", "z"), max_tokens=1)
    rig.run()
    bound = (len(victims) + 1) * (quantum + prompt_steps(rig, 10))
    first_tokens(rig, rng, "abcde", victims, bound + 4, prompt=(1, 10), output=outputs)


@examples(15)
@given(
    seed=st.integers(0, 10**6),
    quantum=st.sampled_from([2, 8]),
    ram=st.integers(4, 9),
    outputs=st.sampled_from([(1, 3), (40, 60)]),
)
def test_an_adapter_that_needs_all_of_ram(seed: int, quantum: int, ram: int, outputs: tuple[int, int]):
    """Small adapters keep RAM full; one that needs all of it is loaded, and look-ahead for the others goes on."""
    rng = random.Random(seed)
    rig = Rig(
        max_loras=3, fairness_quantum=quantum, max_num_batched_tokens=128, adapter_cache_bytes=ram, num_blocks=512,
        check=False,
    )  # fmt: skip
    victims: dict[str, dict] = {"big": {"composition": uses("big", nbytes=ram)}, "small": {"composition": uses("s")}}
    bound = 4 * (quantum + prompt_steps(rig, 10)) + 10
    first_tokens(rig, rng, "abcdefgh", victims, bound, prompt=(1, 10), output=outputs)


def test_a_low_counter_is_no_licence():
    """Whoever was busy for long is not shut out until all others have had as much: its time comes by the clock."""
    rig = Rig(max_loras=1, fairness_quantum=5, max_num_seqs=4)
    rig.add("old", uses("a"), max_tokens=60)
    rig.loads.steps["b"] = 50
    rig.steps(3)
    rig.add("new", uses("b"), max_tokens=100)
    rig.add("old too", uses("a"), prompt=6, max_tokens=60)
    while not rig.is_running("new"):
        rig.step()
    lost = rig.step_number
    while not rig.is_running("old") and "old" not in rig.ends:
        rig.step()
    assert rig.step_number - lost <= 2 * 5


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_sequences_over_two_hundred_adapters(seed: int):
    rng = random.Random(seed)
    rig = Rig(
        max_loras=8, max_num_seqs=32, max_num_batched_tokens=256, num_blocks=600, adapter_cache_bytes=40, check=False,
        fairness_quantum=16,
    )  # fmt: skip
    for i in range(1000):
        rig.add(str(i), uses(f"x{rng.randrange(200)}"), prompt=rng.randrange(1, 30), max_tokens=rng.randrange(1, 12))
    rig.run(4000)
    assert all(len(rig.tokens[name]) == seq.request.params.max_tokens for name, seq in rig.seqs.items())


# -- random workloads -----------------------------------------------------------------------------------------------


@examples(120)
@given(data=st.data())
def test_every_request_ends(data: st.DataObject):
    """Random sizes, adapters, loads that are slow or fail, pins and aborts: integrity holds at every step, every
    batch is what the runner relies on, and everybody ends within a generous number of steps."""
    draw = data.draw
    max_num_seqs = draw(st.integers(1, 6), "seqs")
    num_blocks = draw(st.sampled_from([16, 20, 40]), "blocks")
    ram = draw(st.integers(3, 12), "ram")
    places = draw(st.integers(1, 4), "places")
    rig = Rig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.sampled_from([max_num_seqs, max_num_seqs + 3, 24]), "budget"),
        max_model_len=64,
        num_blocks=num_blocks,
        max_loras=places,
        adapter_cache_bytes=ram,
        fairness_quantum=draw(st.sampled_from([1, 2, 5, 20]), "quantum"),
        max_concurrent_loads=draw(st.integers(1, 3), "loads"),
        load_steps=draw(st.integers(0, 4), "load steps"),
    )
    rng = random.Random(draw(st.integers(0, 10**6), "seed"))
    sizes = {f"x{i}": rng.choice((1, 1, 2, 3)) for i in range(8)}
    rig.loads.broken = {name for name in sizes if rng.random() < 0.1}
    pinned = {name for name in sizes if rng.random() < 0.1}
    num_tokens = 0
    for i in range(rng.randrange(1, 40)):
        names = rng.sample(sorted(sizes), min(places, rng.choice((0, 1, 1, 1, 2, 3))))
        composition = tuple(use for n in names for use in uses(n, nbytes=sizes[n], scale=rng.choice((1.0, 1.0, 0.5))))
        if sum(use.nbytes for use in composition) > ram:  # the engine refuses these
            composition = ()
        prompt = [rng.choice((1, 2)) for _ in range(rng.randrange(1, 50))]
        params = {"prompt_logprobs": 0} if rng.random() < 0.2 else {}
        output = rng.randrange(0, 64 - len(prompt) + 1)
        num_tokens += len(prompt) + output
        rig.add(str(i), composition, prompt=prompt, max_tokens=output, salt=rng.choice((b"", b"t")), **params)
        for _ in range(rng.choice((0, 0, 1, 4))):
            rig.step()
        for name in pinned & set(rig.cache):
            rig.cache.pin(name)
        if rng.random() < 0.1:
            rig.abort(rng.choice(sorted(rig.seqs)))
    rig.run(200 + 20 * num_tokens)
    assert not rig.cache.leased
    assert rig.blocks.num_free_blocks == num_blocks
