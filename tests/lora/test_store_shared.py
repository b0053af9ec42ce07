"""One folder and several stores, as several processes have them: nothing that one of them needs goes."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.errors import AdapterLoadFailed, StartupError
from loraplex.lora.digest import WEIGHTS_NAME
from loraplex.lora.files import CONFIG, WEIGHTS
from loraplex.lora.locks import NameLocks
from loraplex.lora.staging import Staging
from loraplex.lora.steps import unwatched
from loraplex.lora.store import AdapterStore


class Watched:
    """A Step that does something at one step, once."""

    def __init__(self):
        self.step, self.act = "", lambda: None

    def at(self, step: str, act: Any) -> None:
        self.step, self.act = step, act

    def __call__(self, name: str) -> None:
        if name == self.step:
            self.step = ""
            self.act()


@pytest.fixture
def step() -> Watched:
    return Watched()


@pytest.fixture
def ours(tmp_path: Path, step: Watched) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "data", step=step) as store:
        yield store
        store.check_integrity()


@pytest.fixture
def theirs(ours: AdapterStore) -> Iterator[AdapterStore]:
    with AdapterStore(ours.blobs.parent) as store:
        yield store


def fill(staging: Staging, weights: bytes) -> Staging:
    for file, data in ((CONFIG, b"config"), (WEIGHTS, weights)):
        with staging.open(file) as stream:
            stream.write(data)
    return staging


def put(store: AdapterStore, weights: bytes = b"weights") -> str:
    with store.stage() as staging:
        return store.commit(fill(staging, weights))


def staged(store: AdapterStore) -> list[Path]:
    return list((store.blobs.parent / "staging").iterdir())


def test_what_one_puts_the_other_has(ours: AdapterStore, theirs: AdapterStore):
    digest = put(ours)
    with theirs.hold(digest) as folder:
        assert (folder / WEIGHTS_NAME).read_bytes() == b"weights"
    assert put(theirs) == digest


def test_the_sweep_leaves_what_another_holds(ours: AdapterStore, theirs: AdapterStore):
    digest = put(ours)
    with theirs.hold(digest), theirs.hold(digest):
        assert ours.sweep(frozenset) == []
        with ours.hold(digest):
            pass
        assert ours.sweep(frozenset) == [], "our own hold ended, theirs did not"
    assert ours.sweep(frozenset) == [digest]
    with pytest.raises(AdapterLoadFailed, match="gone"):
        theirs.acquire(digest)


def test_the_sweep_leaves_what_another_has_not_yet_published(ours: AdapterStore, theirs: AdapterStore):
    """Between the commit and the registry's row nothing but the stage's hold keeps a blob."""
    with theirs.stage() as staging:
        digest = theirs.commit(fill(staging, b"weights"))
        assert ours.sweep(frozenset) == []
    assert ours.sweep(frozenset) == [digest]


def test_published_while_the_other_sweeps(ours: AdapterStore, theirs: AdapterStore):
    """Files that nothing named are pushed again: their commit, row and end of hold fall between our two looks at the
    registry."""
    live: set[str] = set()
    unused, again = put(ours, b"unused"), put(ours, b"again")

    def look() -> frozenset[str]:
        seen = frozenset(live)
        if not live:
            live.add(put(theirs, b"again"))
        return seen

    assert ours.sweep(look) == [unused]
    assert ours.digests() == live == {again}


def test_both_sweep(ours: AdapterStore, theirs: AdapterStore):
    """Theirs comes between our list and our locks."""
    digest = put(ours)

    def look() -> frozenset[str]:
        theirs.sweep(frozenset)
        return frozenset()

    assert ours.sweep(look) == []
    assert not ours.digests()
    assert put(ours) == digest


def test_taken_up_while_the_other_sweeps(ours: AdapterStore, theirs: AdapterStore, step: Watched):
    """Whoever wants a blob that is being swept waits, and then knows that it is gone."""
    digest = put(ours)
    outcome: list[BaseException] = []

    def want() -> None:
        try:
            theirs.acquire(digest)
        except AdapterLoadFailed as error:
            outcome.append(error)

    waiting = threading.Thread(target=want)
    step.at("sweep: locked", waiting.start)
    assert ours.sweep(frozenset) == [digest]
    waiting.join()
    assert len(outcome) == 1


def test_put_again_while_the_other_sweeps(ours: AdapterStore, theirs: AdapterStore, step: Watched):
    digest = put(ours)
    putting = threading.Thread(target=put, args=(theirs,))
    step.at("sweep: locked", putting.start)
    assert ours.sweep(frozenset) == [digest]
    putting.join()
    assert theirs.digests() == {digest}
    theirs.check_integrity()


def test_one_repairs_at_a_time(ours: AdapterStore, theirs: AdapterStore, step: Watched):
    """Both find the blob damaged; the second waits and then finds it whole, so no moment lacks a good one."""
    digest = put(ours)
    weights = ours.path(digest) / WEIGHTS_NAME
    weights.write_bytes(b"weighty")
    putting = threading.Thread(target=put, args=(theirs,))
    step.at("commit: damaged blob moved away", putting.start)
    put(ours)
    inode = weights.stat().st_ino
    putting.join()
    assert weights.read_bytes() == b"weights"
    assert weights.stat().st_ino == inode


def test_staging_of_the_living_stays(ours: AdapterStore):
    with ours.stage() as staging:
        fill(staging, b"weights")
        with AdapterStore(ours.blobs.parent) as theirs:
            theirs.sweep(frozenset)
            assert put(theirs) == ours.commit(staging)


def test_staging_of_the_dead_goes_with_the_next_sweep(ours: AdapterStore, theirs: AdapterStore):
    with theirs.stage() as staging:
        fill(staging, b"half")
        theirs.close()  # as the system does when a process dies
        assert ours.sweep(frozenset) == []
        assert not staged(ours)


def test_many_at_once(ours: AdapterStore, theirs: AdapterStore):
    """Uploads of few adapters, holds and sweeps of both: every hold sees whole files."""
    errors: list[BaseException] = []

    def work(store: AdapterStore, seed: int) -> None:
        try:
            for number in range(15):
                with store.stage() as staging:
                    digest = store.commit(fill(staging, b"%d" % ((seed + number) % 3)))
                    with store.hold(digest) as folder:
                        if number % 3 == 0:
                            store.sweep(frozenset)
                        assert (folder / WEIGHTS_NAME).stat().st_size == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(store, seed)) for store in (ours, theirs) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    theirs.sweep(frozenset)
    assert not ours.digests()
    assert not staged(ours)


# -- whose adapters these are -----------------------------------------------------------------------------------


def test_a_store_belongs_to_one_registry(ours: AdapterStore, theirs: AdapterStore):
    """Else a wrong --registry-url would have the sweep remove everything."""
    ours.bind("a" * 32)
    ours.bind("a" * 32)
    theirs.bind("a" * 32)
    with pytest.raises(StartupError, match=r"another registry.*--registry-url.*remove .*registry to start anew"):
        theirs.bind("b" * 32)
    assert not staged(ours)


def test_two_registries_bind_at_once(ours: AdapterStore, theirs: AdapterStore):
    outcomes: list[str] = []
    start = threading.Barrier(2)

    def bind(store: AdapterStore, identity: str) -> None:
        start.wait()
        try:
            store.bind(identity)
            outcomes.append("bound")
        except StartupError:
            outcomes.append("refused")

    threads = [threading.Thread(target=bind, args=pair) for pair in ((ours, "a" * 32), (theirs, "b" * 32))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["bound", "refused"]


def test_a_mark_that_cannot_be_written(ours: AdapterStore, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(StartupError, match="Read-only"):
            ours.bind("a" * 32)
    ours.bind("b" * 32)


# -- locks ------------------------------------------------------------------------------------------------------


def test_locks(tmp_path: Path):
    one, other = NameLocks(tmp_path / "locks"), NameLocks(tmp_path / "locks")
    one.share("a")
    other.share("a")
    assert not one.try_take("a")
    assert other.try_take("b")
    other.release("a")
    assert one.try_take("a")
    assert not other.try_take("a")
    one.close()
    assert other.try_take("a")
    other.close()


CHILD = """
import fcntl, sys
from pathlib import Path
if sys.argv[2] == "of the process":
    del fcntl.F_OFD_SETLK
from loraplex.lora.locks import NameLocks
locks = NameLocks(Path(sys.argv[1]))
locks.share("a")
locks.take("b")
print("held", flush=True)
sys.stdin.read(1)
"""


@pytest.mark.parametrize("kind", ["of the file", "of the process"])
def test_locks_end_with_their_process(tmp_path: Path, kind: str):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "locks"), kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        locks = NameLocks(tmp_path / "locks")
        locks.share("a")
        locks.release("a")
        assert not locks.try_take("a")
        assert not locks.try_take("b")
        child.kill()
        child.wait()
        assert locks.try_take("a")
        assert locks.try_take("b")
        locks.close()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", unsupported)
    with pytest.raises(StartupError, match="No locks available.*with locks"):
        AdapterStore(tmp_path)


def test_a_server_watches_no_step():
    assert unwatched("commit: renamed") is None
