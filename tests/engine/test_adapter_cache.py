"""The RAM tier: a state machine against a plain list, and its refusals one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scheduler_rig import FakeWeights, uses

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.eviction import Lrfu, Lru

NAMES = [f"a{i}" for i in range(6)]
SIZES = dict(zip(NAMES, (1, 2, 3, 3, 5, 9), strict=True))
BUDGET = 10


def put(cache: AdapterCache, name: str, nbytes: int = 1, protected=()) -> bool:
    if not cache.reserve(name, nbytes, protected):
        return False
    cache.insert(FakeWeights(name, nbytes))  # type: ignore[arg-type]
    return True


def test_room_is_made_in_the_order_of_use():
    evicted: list[str] = []
    cache = AdapterCache(3, evicted.append)
    for name in "abc":
        assert put(cache, name)
    cache.acquire("a")
    cache.release("a")
    assert put(cache, "d", 2)
    assert evicted == ["b", "c"]
    assert set(cache) == {"a", "d"}
    assert cache.num_evictions == 2


def test_peek_is_no_use():
    cache = AdapterCache(2)
    put(cache, "a")
    put(cache, "b")
    cache.peek("a")
    put(cache, "c")
    assert set(cache) == {"b", "c"}


@pytest.mark.parametrize("hold", ["lease", "pin", "protect", "reserve"])
def test_what_is_held_stays_and_a_refusal_evicts_nothing(hold: str):
    evicted: list[str] = []
    cache = AdapterCache(4, evicted.append)
    protected: set[str] = set()
    if hold == "reserve":
        assert cache.reserve("held", 2, ())
    else:
        put(cache, "held", 2)
        put(cache, "other", 2)
    match hold:
        case "lease":
            cache.acquire("held")
        case "pin":
            cache.pin("held")
        case "protect":
            protected = {"held"}
    assert not cache.reserve("new", 3, protected)
    assert not cache.can_reserve(3, protected)
    assert not evicted
    assert cache.reserve("new", 2, protected)
    assert evicted == ([] if hold == "reserve" else ["other"])
    cache.check_integrity()


def test_leases_that_are_about_to_end_count_as_room():
    cache = AdapterCache(2)
    for name in "ab":
        put(cache, name)
        cache.acquire(name)
    cache.pin("b")
    assert not cache.can_reserve(1, ())
    assert cache.can_reserve(1, (), {"a"})
    assert not cache.can_reserve(1, {"a"}, {"a"})
    assert not cache.can_reserve(2, (), {"a", "b"})


def test_an_adapter_larger_than_everything_is_refused():
    cache = AdapterCache(4)
    put(cache, "a")
    assert not cache.reserve("big", 5, ())
    assert "a" in cache


def test_an_adapter_larger_than_its_reservation_is_refused():
    cache = AdapterCache(4)
    assert cache.reserve("a", 1, ())
    with pytest.raises(ValueError, match="2 bytes, 1 were reserved"):
        cache.insert(FakeWeights("a", 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 were reserved"):
        cache.insert(FakeWeights("b", 1))  # type: ignore[arg-type]
    assert cache.reserved_bytes == 0
    cache.check_integrity()


def test_a_leased_adapter_cannot_be_evicted_by_hand():
    evicted: list[str] = []
    cache = AdapterCache(4, evicted.append)
    put(cache, "a")
    cache.acquire("a")
    cache.acquire("a")
    cache.release("a")
    with pytest.raises(ValueError, match="in use"):
        cache.evict("a")
    cache.release("a")
    cache.evict("a")
    cache.evict("a")
    assert evicted == ["a"]
    with pytest.raises(ValueError, match="not leased"):
        cache.release("a")
    with pytest.raises(KeyError):
        cache.acquire("a")


def test_clear_lets_go_of_what_nobody_holds():
    evicted: list[str] = []
    cache = AdapterCache(4, evicted.append)
    for name in "abc":
        put(cache, name)
    cache.acquire("a")
    cache.pin("b")
    cache.clear()
    assert set(cache) == {"a", "b"}
    assert evicted == ["c"]
    cache.check_integrity()


def test_what_can_ever_be_held():
    cache = AdapterCache(4)
    assert cache.can_ever_hold(uses("a", "b", nbytes=2))
    assert not cache.can_ever_hold(uses("a", "b", nbytes=3))
    cache.pin("a")  # not resident: takes no room yet
    assert cache.can_ever_hold(uses("b", nbytes=4))
    put(cache, "a", 2)
    assert cache.can_ever_hold(uses("a", "b", nbytes=2))
    assert not cache.can_ever_hold(uses("b", nbytes=3))
    cache.unpin("a")
    assert cache.can_ever_hold(uses("b", nbytes=4))
    assert not cache.has_pins


@pytest.mark.parametrize("fault", ["size", "lease", "reservation", "budget"])
def test_integrity_notices(fault: str):
    cache = AdapterCache(4)
    put(cache, "a", 2)
    match fault:
        case "size":
            cache._Cache__currsize = 1  # type: ignore[attr-defined]
        case "lease":
            cache._leases["gone"] = 1
        case "reservation":
            cache._reserved["a"] = 1
        case "budget":
            cache._reserved["b"] = 3
    with pytest.raises(AssertionError):
        cache.check_integrity()


class CacheMachine(RuleBasedStateMachine):
    """The model: what is resident with the number of its last use, and sets beside it."""

    policy = Lru

    def __init__(self):
        super().__init__()
        self.evicted: list[str] = []
        self.worths = self.policy()
        self.cache = AdapterCache(BUDGET, self.evicted.append, self.worths)
        self.last: dict[str, int] = {}
        self.clock = 0
        self.leases: dict[str, int] = dict.fromkeys(NAMES, 0)
        self.pins: set[str] = set()
        self.reserved: set[str] = set()

    def touch(self, name: str) -> None:
        self.clock += 1
        self.last[name] = self.clock

    def free(self) -> int:
        return BUDGET - sum(SIZES[name] for name in [*self.last, *self.reserved])

    def in_order(self) -> list[str]:
        """Who should leave first."""
        return sorted(self.last, key=self.worths.worth)

    @rule(name=st.sampled_from(NAMES), protected=st.sets(st.sampled_from(NAMES)))
    def reserve(self, name, protected):
        if name in self.last or name in self.reserved:
            return
        evictable = [n for n in self.in_order() if not self.leases[n] and n not in self.pins | protected]
        expected = SIZES[name] <= self.free() + sum(SIZES[n] for n in evictable)
        self.evicted.clear()
        assert self.cache.reserve(name, SIZES[name], protected) is expected
        gone = []
        if expected:
            while SIZES[name] > self.free():
                gone.append(evictable.pop(0))
                del self.last[gone[-1]]
            self.reserved.add(name)
        assert self.evicted == gone

    @rule(name=st.sampled_from(NAMES), fails=st.booleans())
    def finish_load(self, name, fails):
        if name not in self.reserved:
            return
        self.reserved.discard(name)
        if fails:
            self.cache.cancel_reservation(name)
        else:
            self.cache.insert(FakeWeights(name, SIZES[name]))  # type: ignore[arg-type]
            self.touch(name)

    @rule(name=st.sampled_from(NAMES))
    def acquire(self, name):
        if name in self.last:
            self.cache.acquire(name)
            self.leases[name] += 1
            self.touch(name)

    @rule(name=st.sampled_from(NAMES))
    def release(self, name):
        if self.leases[name]:
            self.cache.release(name)
            self.leases[name] -= 1
            self.touch(name)

    @rule(name=st.sampled_from(NAMES), pins=st.booleans())
    def pin(self, name, pins):
        (self.cache.pin if pins else self.cache.unpin)(name)
        (self.pins.add if pins else self.pins.discard)(name)

    @rule(name=st.sampled_from(NAMES))
    def evict(self, name):
        if self.leases[name]:
            with pytest.raises(ValueError):
                self.cache.evict(name)
        else:
            self.cache.evict(name)
            self.last.pop(name, None)

    @invariant()
    def agrees(self):
        self.cache.check_integrity()
        assert set(self.cache) == set(self.last)
        assert self.cache.currsize == sum(SIZES[n] for n in self.last) <= BUDGET
        assert self.cache.reserved_bytes == sum(SIZES[n] for n in self.reserved)
        assert self.cache.leased == {n for n, count in self.leases.items() if count}
        assert all(self.cache.num_leases(n) == count for n, count in self.leases.items())
        if self.policy is Lru:
            assert self.in_order() == sorted(self.last, key=self.last.__getitem__)


class LrfuMachine(CacheMachine):
    policy = Lrfu


TestCacheMachine = CacheMachine.TestCase
TestLrfuMachine = LrfuMachine.TestCase
for case in (TestCacheMachine, TestLrfuMachine):
    case.settings = settings(max_examples=100, stateful_step_count=40)
