"""Two processes on one store and registry, against the slow model of `registry_model`: any order of pushes, rollbacks,
deletions, children, sweeps, holds, uploads under way, refusing disks and deaths."""

import errno
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from disk_tier import CONFIG_BYTES, FACTS, DiskTier, digest_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from registry_model import CONTENTS, RegistryModel

from loraplex.errors import AdapterLoadFailed, StorageFull
from loraplex.lora.files import CONFIG, WEIGHTS
from loraplex.lora.staging import Staging
from loraplex.lora.steps import STEPS

PROCESSES = st.sampled_from([0, 1])
NAMES = st.sampled_from(["a", "a", "a", "b"])
CONTENT = st.integers(0, len(CONTENTS) - 1)
VERSION = st.none() | st.integers(1, 3)
REFUSING = [
    step for step in STEPS if step.startswith(("stage:", "commit:")) and step != "stage: file opened"
]  # what comes after that one is the next one's


class Process:
    """A DiskTier with what it has under way; its disk refuses at the step `refusing`."""

    def __init__(self, root: Path):
        self.refusing = ""
        self.tier = DiskTier(root, f"sqlite:///{root.parent / 'registry.sqlite'}", self._step)
        self.held: list[str] = []
        self.uploads: list[tuple[ExitStack, Staging, int]] = []

    def _step(self, name: str) -> None:
        if name == self.refusing:
            self.refusing = ""
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def die(self) -> None:
        """Its locks end with it; nothing is tidied up while somebody keeps it in mind."""
        self.tier.close()

    @property
    def needs(self) -> set[str]:
        return {*self.held, *(staging.digest for _, staging, _ in self.uploads)}


class DiskMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="loraplex-machine-"))
        self.root = self.folder / "data"
        self.model = RegistryModel()
        self.damaged: set[int] = set()
        self.processes = [Process(self.root), Process(self.root)]
        self.dead: list[Process] = []

    def teardown(self) -> None:
        try:
            for process in self.processes:
                process.die()
            with ExitStack() as stack:
                last = Process(self.root)
                stack.callback(last.die)
                last.tier.do("sweep", "", None)
                live = {digest_of(content) for content in self.model.contents}
                assert last.tier.store.digests() <= live
                assert live - last.tier.store.digests() <= {digest_of(content) for content in self.damaged}
                assert last.tier.seen() == self.model.seen()
                assert not last.tier.staged
        finally:
            shutil.rmtree(self.folder)

    def do(self, at: int, verb: str, name: str, number: int | None) -> bool:
        """Whether it was done."""
        process = self.processes[at]
        try:
            process.tier.do(verb, name, number)
        except StorageFull:
            process.refusing = ""
            return False
        self.model = self.model.after((verb, name, number))
        return True

    @rule(at=PROCESSES, name=NAMES, contents=st.lists(CONTENT, min_size=1, max_size=4))
    def push(self, at: int, name: str, contents: list[int]) -> None:
        for content in contents:
            if self.do(at, "push", name, content):
                self.damaged.discard(content)

    @rule(at=PROCESSES, name=NAMES, content=CONTENT)
    def push_child(self, at: int, name: str, content: int) -> None:
        has_parent = name in self.model.seen()["names"]
        if self.do(at, "child", name, content) and has_parent:
            self.damaged.discard(content)

    @rule(at=PROCESSES, name=NAMES, version=VERSION)
    def delete_child(self, at: int, name: str, version: int | None) -> None:
        assert self.do(at, "prune", name, version)

    @rule(at=PROCESSES, name=NAMES, to=VERSION)
    def roll_back(self, at: int, name: str, to: int | None) -> None:
        assert self.do(at, "rollback", name, to)

    @rule(at=PROCESSES, name=NAMES, version=VERSION)
    def delete(self, at: int, name: str, version: int | None) -> None:
        assert self.do(at, "delete", name, version)

    @rule(at=PROCESSES)
    def sweep(self, at: int) -> None:
        assert self.do(at, "sweep", "", None)
        needed = {digest_of(content) for content in self.model.contents}
        needed = needed.union(*(process.needs for process in self.processes))
        assert self.processes[at].tier.store.digests() <= needed, "orphans after the sweep"

    @rule(at=PROCESSES, content=CONTENT)
    def damage(self, at: int, content: int) -> None:
        if digest_of(content) in self.processes[at].tier.store.digests():
            self.processes[at].tier.do("damage", "", content)
            self.damaged.add(content)

    @rule(at=PROCESSES, step=st.sampled_from(REFUSING))
    def refuse(self, at: int, step: str) -> None:
        self.processes[at].refusing = step

    @rule(at=PROCESSES, content=CONTENT)
    def hold(self, at: int, content: int) -> None:
        process = self.processes[at]
        try:
            process.tier.store.acquire(digest_of(content))
        except AdapterLoadFailed:
            assert content in self.damaged or content not in self.model.contents, "a version without files"
        else:
            process.held.append(digest_of(content))

    @precondition(lambda self: any(process.held for process in self.processes))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from([process for process in self.processes if process.held]))
        process.tier.store.release(process.held.pop())

    @rule(at=PROCESSES, content=CONTENT)
    def begin_upload(self, at: int, content: int) -> None:
        """Staged and made a blob, and not yet a version."""
        process = self.processes[at]
        with ExitStack() as stack:
            try:
                staging = stack.enter_context(process.tier.store.stage())
                for file, data in ((CONFIG, CONFIG_BYTES), (WEIGHTS, CONTENTS[content])):
                    with staging.open(file) as stream:
                        stream.write(data)
                process.tier.store.commit(staging)
            except StorageFull:
                return
            self.damaged.discard(content)
            process.uploads.append((stack.pop_all(), staging, content))

    @precondition(lambda self: any(process.uploads for process in self.processes))
    @rule(data=st.data(), name=NAMES, is_accepted=st.booleans())
    def end_upload(self, data: st.DataObject, name: str, is_accepted: bool) -> None:
        process = data.draw(st.sampled_from([process for process in self.processes if process.uploads]))
        stack, staging, content = process.uploads.pop()
        with stack:
            if is_accepted:
                process.tier.registry.publish(name, staging.digest, FACTS, source="upload", who="me")
                self.model = self.model.after(("push", name, content))

    @rule(at=PROCESSES)
    def die_and_start(self, at: int) -> None:
        self.processes[at].die()
        self.dead.append(self.processes[at])
        self.processes[at] = Process(self.root)

    @invariant()
    def what_was_accepted_is_there(self) -> None:
        live = {digest_of(content) for content in self.model.contents}
        needed = live.union(*(process.needs for process in self.processes))
        lost = {digest_of(content) for content in self.damaged}
        for process in self.processes:
            assert process.tier.seen() == self.model.seen()
            assert process.tier.registry.live_digests() == live
            process.tier.registry.check_integrity()
            present = process.tier.store.digests()
            assert needed - present <= lost, "the sweep took what is needed"
            assert process.tier.broken(frozenset(needed & present)) <= self.damaged


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
