"""What leaves RAM first: recency alone, and recency with frequency and size."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.eviction import NAMES, EvictionPolicy, Lrfu, Lru, eviction_policy

MIB = 1 << 20


def filled(policy: EvictionPolicy, sizes: dict[str, int]) -> EvictionPolicy:
    for digest, nbytes in sizes.items():
        policy.insert(digest, nbytes)
    return policy


def use(policy: EvictionPolicy, text: str) -> None:
    for digest in text:
        policy.use(digest)


def order(policy: EvictionPolicy, digests: str) -> str:
    return "".join(sorted(digests, key=policy.worth))


def test_policies_by_name():
    assert [type(eviction_policy(name)) for name in NAMES] == [Lru, Lrfu]
    with pytest.raises(ValueError, match="one of lru, lrfu, not 'fifo'"):
        eviction_policy("fifo")


@pytest.mark.parametrize("name", NAMES)
def test_at_first_what_came_first_leaves_first(name: str):
    policy = filled(eviction_policy(name), dict.fromkeys("abc", MIB))
    use(policy, "abc")
    assert order(policy, "abc") == "abc"


def test_lru_sees_the_last_use_only():
    policy = filled(Lru(), dict.fromkeys("abc", MIB))
    use(policy, "aaaabc")
    assert order(policy, "abc") == "abc"


def test_lrfu_keeps_what_is_used_often_until_it_is_not():
    policy = filled(Lrfu(), dict.fromkeys("abc", MIB))
    use(policy, "aaaabc")
    assert order(policy, "abc") == "bca"
    use(policy, "bc" * 200)
    assert order(policy, "abc") == "abc"


def test_lrfu_lets_the_larger_of_two_go():
    policy = filled(Lrfu(), {"a": 8 * MIB, "b": MIB})
    use(policy, "ba")
    assert order(policy, "ab") == "ab"


def test_lrfu_remembers_what_left():
    policy = filled(Lrfu(), dict.fromkeys("abc", MIB))
    use(policy, "aaab")
    policy.remove("a")
    policy.insert("d", MIB)
    policy.insert("a", MIB)
    use(policy, "ad")
    assert order(policy, "abd") == "bda"


def test_what_is_loaded_ahead_is_not_the_first_to_leave():
    policy = filled(Lrfu(), dict.fromkeys("ab", MIB))
    use(policy, "ab")
    policy.insert("c", MIB)
    assert order(policy, "abc") == "abc"


def test_memory_of_what_left_is_bounded():
    policy = Lrfu()
    for index in range(20_000):
        policy.insert(str(index), MIB)
        policy.use(str(index))
        if index >= 4:
            policy.remove(str(index - 4))
    assert policy.num_remembered <= 4 * Lrfu.HALF_LIFE * Lrfu.MEMORY * 5


@settings(max_examples=100)
@given(st.lists(st.sampled_from("abcd"), max_size=60))
def test_lrfu_is_the_sum_of_its_docstring(uses: list[str]):
    policy = filled(Lrfu(), dict.fromkeys("abcd", MIB))
    sums = dict.fromkeys("abcd", 0.0)
    step = 1 / (Lrfu.HALF_LIFE * 4)
    for count, digest in enumerate(uses, 1):
        policy.use(digest)
        sums[digest] += 2 ** (count * step)
    weight = math.log2((Lrfu.FIXED_BYTES + MIB) / MIB)
    for digest, total in sums.items():
        expected = weight + (math.log2(total) if total else 0.0)
        assert policy.worth(digest) == pytest.approx(expected, abs=1e-9)
