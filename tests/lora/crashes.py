"""A program that kills processes at the steps of the disk tier and looks at what they leave.

    python crashes.py one   ROOT URL SEED ROUNDS     one process at a time, killed at every step in turn
    python crashes.py routes ROOT URL SEED ROUNDS    the same at the steps of a change of a route
    python crashes.py three ROOT URL SEED ROUNDS     three on one store and registry, each killed somewhere

It stays light (no torch) and forks, so that a kill costs tens of milliseconds. Prints, as JSON, how often a process was
killed at which step; ends with a traceback when something acknowledged is missing or something half done is seen.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disk_tier import digest_of, opened
from registry_model import CONTENTS, RegistryModel, alias_of, child_of

from loraplex.lora.steps import STEPS

Operation = tuple[str, str, int | None]


def operations(rng: random.Random, names: list[str], count: int, *, damages: bool) -> list[Operation]:
    verbs = ["push"] * 6 + ["rollback"] * 3 + ["delete"] * 2 + ["sweep"] + ["route"] * 4 + ["damage"] * 2 * damages
    verbs += ["child"] * 3 + ["prune"] * 2
    made: list[Operation] = []
    while len(made) < count:
        verb, name = rng.choice(verbs), rng.choice(names)
        number = (
            rng.randrange(len(CONTENTS)) if verb in ("push", "child", "damage") else rng.choice([None, None, 1, 2, 3])
        )
        number = rng.choice([None, 1, 2, 3]) if verb == "route" else number
        made.append((verb, name, number))
        if verb == "damage":
            made.append(("push", name, number))
    return made


def leading_to(step: str, rng: random.Random) -> list[Operation]:
    """Operations that meet `step`."""
    first, second = rng.sample(range(len(CONTENTS)), 2)
    pushes: list[Operation] = [("push", "a", first), ("push", "a", second)]
    if "damaged" in step:
        return [*pushes, ("damage", "a", first), ("push", "a", first)]
    if step.startswith("route:"):
        return [("route", "a", 7), ("route", "a", None), ("route", "a", 8), ("route", "b", 8)]
    if step.startswith("rollback:"):
        return [*pushes, ("rollback", "a", None)]
    return [*pushes, *(("prune", name, None) for name in "ba"), *(("delete", name, None) for name in "ba"), *pushes]


class Killer:
    """The Step of a process that dies at the `count`-th time of `step`."""

    def __init__(self, step: str, count: int):
        self._step, self._left = step, count

    def __call__(self, name: str) -> None:
        if name == self._step:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def fork(root: Path, url: str, todo: list[Operation], killer: Killer) -> tuple[int, int]:
    """A process that does `todo`: its id, and the pipe in which it acknowledges each one with a byte."""
    acknowledged, says = os.pipe()
    pid = os.fork()
    if pid:
        os.close(says)
        return pid, acknowledged
    status = 1
    try:
        os.close(acknowledged)
        with opened(root, url, killer) as tier:
            for operation in todo:
                tier.do(*operation)
                os.write(says, b".")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def outcome(pid: int, acknowledged: int) -> tuple[int, bool]:
    """How many operations a process acknowledged, and whether it was killed. Nothing else may have ended it."""
    count = 0
    while said := os.read(acknowledged, 1024):
        count += len(said)
    os.close(acknowledged)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"process ended with {status}"
    return count, killed


def check(root: Path, url: str, candidates: list[RegistryModel], damaged: set[int]) -> RegistryModel:
    """Open what was left: it is one of `candidates`, whole but for what the disk lost; returns which."""
    with opened(root, url) as tier:
        tier.registry.check_integrity()
        seen = tier.seen()
        found = [model for model in candidates if model.seen() == seen]
        assert found, f"seen {seen}\nexpected {[model.seen() for model in candidates]}"
        model = found[0]
        live = tier.registry.live_digests()
        assert live == {digest_of(content) for content in model.contents}
        assert tier.broken(live) <= damaged, f"{tier.broken(live)} are not whole"
        tier.store.sweep(tier.registry.live_digests)
        assert tier.store.digests() <= live, "orphans after the sweep"
        assert live - tier.store.digests() <= {digest_of(content) for content in damaged}, (
            "the sweep took what is named"
        )
        assert not tier.staged, tier.staged
        for content in damaged & model.contents:  # a person pushes it again; that changes what the name means
            name = next(name for name, one in sorted(model.names.items()) if content in dict(one.ready.values()))
            tier.do("push", name, content)
            model = model.after(("push", name, content))
        assert not tier.broken(live)
    return model


def damaged_by(done: list[Operation], under_way: list[Operation]) -> set[int]:
    """The contents that the disk may have lost: damaged by what began, and not pushed since by what is acknowledged."""
    lost: set[int] = set()
    for verb, _, number in [*done, *under_way]:
        if verb == "damage" and number is not None:
            lost.add(number)
        elif verb == "push" and number in lost and (verb, _, number) not in under_way:
            lost.discard(number)
    return lost


def one_at_a_time(root: Path, url: str, rng: random.Random, rounds: int, steps: Sequence[str] = STEPS) -> Counter[str]:
    kills: Counter[str] = Counter()
    model = RegistryModel()
    for _ in range(rounds):
        for step in steps:
            todo = operations(rng, ["a", "b"], rng.randrange(6), damages=True)
            todo += [*leading_to(step, rng), *operations(rng, ["a", "b"], 4, damages=True)]
            pid, acknowledged = fork(root, url, todo, Killer(step, rng.choice([1, 1, 2, 3])))
            count, killed = outcome(pid, acknowledged)
            for operation in todo[:count]:
                model = model.after(operation)
            under_way = todo[count : count + 1]
            candidates = [model, *(model.after(operation) for operation in under_way)]
            model = check(root, url, candidates, damaged_by(todo[:count], under_way))
            kills[step] += killed
    return kills


def routes_changed(root: Path, url: str, rng: random.Random, rounds: int) -> Counter[str]:
    return one_at_a_time(root, url, rng, rounds, [step for step in STEPS if step.startswith("route:")])


def three_at_once(root: Path, url: str, rng: random.Random, rounds: int) -> Counter[str]:
    """Each has a name of its own, so that each name's changes are in order; the files are the same for all."""
    kills: Counter[str] = Counter()
    models = [RegistryModel() for _ in range(3)]
    for _ in range(rounds):
        todos = [operations(rng, [f"name{number}"], 18, damages=False) for number in range(3)]
        steps = [rng.choice(STEPS) for _ in todos]
        running = [
            fork(root, url, todo, Killer(step, rng.randint(1, 4))) for todo, step in zip(todos, steps, strict=True)
        ]
        ends = [outcome(pid, acknowledged) for pid, acknowledged in running]
        with opened(root, url) as tier:
            tier.registry.check_integrity()
            seen = tier.seen()
            for number, (count, killed) in enumerate(ends):
                kills[steps[number]] += killed
                for operation in todos[number][:count]:
                    models[number] = models[number].after(operation)
                candidates = [models[number], *(models[number].after(one) for one in todos[number][count : count + 1])]
                of_name = part(seen, f"name{number}")
                found = [model for model in candidates if model.seen() == of_name]
                assert found, f"seen {of_name}\nexpected {[model.seen() for model in candidates]}"
                models[number] = found[0]
            live = tier.registry.live_digests()
            assert live == {digest_of(content) for model in models for content in model.contents}
            assert not tier.broken(live)
            tier.store.sweep(tier.registry.live_digests)
            assert tier.store.digests() == live
            assert not tier.staged
    return kills


def part(seen: dict[str, Any], name: str) -> dict[str, Any]:
    """What is seen of one name."""
    ours = {name, alias_of(name), child_of(name)}
    found = {key: {one: of for one, of in seen[key].items() if one in ours} for key in ("names", "routes")}
    return {**found, "events": [event for event in seen["events"] if event[1] in ours]}


def main() -> None:
    how, root, url, seed, rounds = sys.argv[1:]
    run = {"one": one_at_a_time, "routes": routes_changed, "three": three_at_once}[how]
    kills = run(Path(root), url, random.Random(int(seed)), int(rounds))
    assert "torch" not in sys.modules
    json.dump(kills, sys.stdout)


if __name__ == "__main__":
    main()
