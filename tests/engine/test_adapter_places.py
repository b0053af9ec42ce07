"""Places of the device pool: a bijection, least recently used first, tenures."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.adapter_places import AdapterPlaces


def test_places_are_given_in_turn_and_taken_from_the_least_recently_used():
    places = AdapterPlaces(2)
    assert [places.assign(name, (), step) for step, name in enumerate("ab")] == [0, 1]
    assert places.assign("a", (), 5) == 0  # touched
    assert places.assign("c", (), 6) == 1
    assert "b" not in places
    assert places.digests == ["a", "c"]
    assert len(places) == 2


def test_who_is_in_use_keeps_its_place():
    places = AdapterPlaces(2)
    for name in "ab":
        places.assign(name, (), 0)
    assert places.assign("c", {"a"}, 1) == 1
    assert places.can_hold("ca", "ac")
    assert not places.can_hold("b", "ac")
    assert places.can_hold("b", "a")


def test_tenures():
    places = AdapterPlaces(2)
    places.assign("a", (), 3)
    places.assign("a", (), 7)
    assert places.since("a") == 3
    places.renew("a", 9)
    assert places.since("a") == 9
    assert places.release("a") == 0
    assert places.release("a") is None
    with pytest.raises(KeyError):
        places.since("a")


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["assign", "renew", "release"]), st.sampled_from("abcdef"), st.booleans())),
)
def test_a_bijection_always(num_places: int, ops: list[tuple[str, str, bool]]):
    places = AdapterPlaces(num_places)
    model: dict[str, int] = {}
    for step, (verb, name, others_in_use) in enumerate(ops):
        if verb == "release":
            assert places.release(name) == model.pop(name, None)
        elif verb == "renew" and name in model:
            places.renew(name, step)
            model[name] = model.pop(name)
        elif verb == "assign":
            in_use = set(list(model)[: num_places - 1]) if others_in_use else set()
            place = places.assign(name, in_use, step)
            if name in model:
                assert place == model[name]
            elif len(model) == num_places:
                gone = next(other for other in model if other not in in_use)
                assert place == model.pop(gone)
            assert place not in {p for other, p in model.items() if other != name}
            model.pop(name, None)
            model[name] = place
        places.check_integrity()
        assert {digest: places.place_of(digest) for digest in places.digests} == model


def test_integrity_notices_two_in_one_place():
    places = AdapterPlaces(2)
    for name in "ab":
        places.assign(name, (), 0)
    places._place_of["b"] = 0
    with pytest.raises(AssertionError, match="bijection"):
        places.check_integrity()
