"""When merged weights are built and dropped."""

from loraplex.engine.merge_policy import MAX_DOUBLINGS, MergePolicy, Wish


def feed(policy: MergePolicy, *steps: tuple[str | None, int]) -> list[tuple[int, Wish]]:
    """Each adapter for so many steps; the wishes and when they came (counted from 1)."""
    wishes, time = [], 0
    for sole, count in steps:
        for _ in range(count):
            time += 1
            wish = policy.observe(sole)
            if wish != Wish():
                wishes.append((time, wish))
    return wishes


def test_a_run_of_its_own_steps_builds_once():
    assert feed(MergePolicy(4, 10), ("a", 30)) == [(4, Wish(build="a"))]


def test_a_step_of_others_breaks_the_run():
    assert feed(MergePolicy(4, 10), *[("a", 3), (None, 1)] * 5) == []
    assert feed(MergePolicy(4, 10), *[("a", 3), ("b", 3)] * 5) == []


def test_the_base_is_nobodys():
    assert feed(MergePolicy(4, 10), (None, 50)) == []


def test_dropped_after_a_long_time_without_a_step_of_its_own():
    assert feed(MergePolicy(4, 10), ("a", 4), (None, 9), ("a", 1), (None, 9), ("a", 1), (None, 10)) == [
        (4, Wish(build="a")),
        (34, Wish(drop="a")),
    ]


def test_the_lead_passes_to_another():
    assert feed(MergePolicy(4, 10), ("a", 5), ("b", 40)) == [(4, Wish(build="a")), (15, Wish(build="b", drop="a"))]


def test_each_drop_doubles_the_run_that_is_needed():
    policy = MergePolicy(4, 10)
    times = [feed(policy, ("a", 400), (None, 10))[0][0] for _ in range(MAX_DOUBLINGS + 3)]
    assert times == [4, 8, 16, 32, 64, 128, 256, 256, 256]


def test_two_that_take_turns_do_not_see_saw():
    policy = MergePolicy(4, 10)
    builds = [wish for _, wish in feed(policy, *[("a", 20), ("b", 20)] * 100) if wish.build]
    assert len(builds) < 10


def test_forgotten_is_not_asked_for_again_at_once():
    policy = MergePolicy(4, 10)
    assert feed(policy, ("a", 4)) == [(4, Wish(build="a"))]
    policy.forget("a")
    assert feed(policy, ("a", 30)) == [(8, Wish(build="a"))]
