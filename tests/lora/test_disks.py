"""Disks that are full, read-only or that rot: a clear error, nothing lost, and it works again when they do."""

import ctypes
import errno
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disk_tier import CONTENT_OF, DiskTier, digest_of, opened
from registry_model import RegistryModel

from loraplex.errors import AdapterLoadFailed, StartupError, StorageFull
from loraplex.lora.digest import WEIGHTS_NAME
from loraplex.lora.files import CONFIG, WEIGHTS
from loraplex.lora.steps import STEPS

HERE = Path(__file__).parent
Program = Callable[[str], str]


def url_of(root: Path) -> str:
    return f"sqlite:///{root / 'registry.sqlite'}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with a@1 and a@2."""
    root = tmp_path / "data"
    with opened(root, f"sqlite:///{tmp_path / 'unused.sqlite'}"):
        pass
    (root / "registry").unlink()
    with opened(root, url_of(root)) as tier:
        tier.do("push", "a", 0)
        tier.do("push", "a", 1)
    return root


def expected(*operations: tuple[str, str, int | None]) -> dict:
    model = RegistryModel()
    for operation in [("push", "a", 0), ("push", "a", 1), *operations]:
        model = model.after(operation)
    return model.seen()


def check(root: Path, *operations: tuple[str, str, int | None]) -> None:
    """Everything that was accepted is there, nothing else, and it works."""
    with opened(root, url_of(root)) as tier:
        assert tier.seen() == expected(*operations)
        tier.do("sweep", "", None)
        assert tier.store.digests() == tier.registry.live_digests()
        assert not tier.broken(tier.store.digests())
        assert not tier.staged
        tier.do("push", "other", 4)
        tier.do("delete", "other", None)


def program(root: Path) -> Program:
    """Runs Python in a process of its own, with `tier` opened on `root` where it says so."""

    def run(code: str) -> str:
        head = "import os, sys\nfrom pathlib import Path\nfrom disk_tier import opened\n"
        head += f"root, url = Path({str(root)!r}), {url_of(root)!r}\n"
        done = subprocess.run(
            [sys.executable, "-c", head + textwrap.dedent(code)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


# -- full -------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_grow(root: Path):
    """The system's own refusal in the middle of an upload, and of the registry's file."""
    said = program(root)(f"""
        import resource
        from loraplex.errors import StorageFull
        from loraplex.lora.files import CONFIG, WEIGHTS
        with opened(root, url) as tier:
            most = max(path.stat().st_size for path in root.glob("registry.sqlite*"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (most + 1, {resource.RLIM_INFINITY}))
            try:
                with tier.store.stage() as staging, staging.open(WEIGHTS) as file:
                    for _ in range(1000):
                        file.write(b"x" * 1000)
            except StorageFull as error:
                print(error.message)
            assert tier.staged == []
            try:
                for number in range(100):
                    tier.registry.rollback("a", 1 + number % 2, who="me")
            except StorageFull as error:
                print(error.message)
            assert tier.registry.get("a").name == "a", "it can still be read"
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            tier.registry.rollback("a", 2, who="me")
            tier.registry.rollback("a", 1, who="me")
            tier.registry.check_integrity()
            print(tier.registry.get("a").model_id)
    """)
    upload, change, after = said.splitlines()
    assert "adapter_model.safetensors: File too large" in upload
    assert "registry refuses a change" in change
    assert after == "a@1"
    with opened(root, url_of(root)) as tier:
        tier.registry.check_integrity()
        assert tier.store.digests() == tier.registry.live_digests() == {digest_of(0), digest_of(1)}
        assert not tier.staged


CAUSES = (errno.ENOSPC, errno.EROFS, errno.EIO)
AT_DISK = [step for step in STEPS if step.startswith(("stage:", "commit:", "sweep:"))]
DONE = ("stage: file opened", "sweep: removed")  # what comes after these is another step's


@pytest.mark.parametrize(
    ("step", "cause"), [(step, CAUSES[at % 3]) for at, step in enumerate(AT_DISK) if step not in DONE]
)
def test_a_disk_that_refuses_after_every_step(root: Path, step: str, cause: int):
    """The store's steps one by one: what was asked for is refused or done, and nothing else changes."""
    left = 1

    def refuse(name: str) -> None:
        nonlocal left
        if name == step and left:
            left -= 1
            raise OSError(cause, os.strerror(cause))

    operations: list[tuple[str, str, int | None]] = [("push", "a", 2), ("damage", "a", 0), ("push", "a", 0)]
    operations.append(("delete", "a", 2))
    refusals: list[str] = []
    with opened(root, url_of(root), refuse) as tier:
        for operation in operations:
            try:
                tier.do(*operation)
            except StorageFull as error:
                refusals.append(str(error))
                if operation[0] != "delete":  # that the registry has done; the next sweep makes up for it
                    tier.do(*operation)
        (refusal,) = refusals
        assert os.strerror(cause) in refusal
    check(root, *operations)


# -- read-only --------------------------------------------------------------------------------------------------


@contextmanager
def unprivileged() -> Iterator[None]:
    """For the length of the block rights are asked for: root without the capabilities to pass over them."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective set
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    paths = [root, *root.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(modes[path] & ~0o222)
    try:
        with unprivileged():
            yield
    finally:
        for path in paths:
            path.chmod(modes[path])


def test_a_folder_that_may_only_be_read(root: Path):
    with read_only(root), pytest.raises(StartupError, match="Permission denied.*--data-dir"):
        DiskTier(root, url_of(root))
    check(root)


def test_a_registry_that_may_only_be_read(root: Path):
    """It is refused, at start or with the first change: SQLite opens such a file on some systems."""
    (root / "registry.sqlite").chmod(0o400)
    said: list[str] = []
    with unprivileged():
        try:
            with opened(root, url_of(root)) as tier:
                assert tier.registry.get("a").model_id == "a@2"
                for operation in (("push", "a", 2), ("rollback", "a", None), ("delete", "a", None)):
                    try:
                        tier.do(*operation)
                    except StorageFull as error:
                        said.append(error.message)
                assert len(said) == 3
        except StartupError as error:
            said.append(error.message)
    assert said
    for message in said:
        assert "attempt to write a readonly database" in message
    for path in root.glob("registry.sqlite*"):  # what SQLite puts beside it has its rights
        path.chmod(0o600)
    check(root)


def test_a_folder_that_may_only_be_read_while_it_is_used(root: Path):
    with opened(root, url_of(root)) as tier:
        with read_only(root):
            with pytest.raises(StorageFull, match="Permission denied"):
                tier.do("push", "a", 2)
            with tier.store.hold(tier.registry.get("a").digest) as folder:
                assert (folder / WEIGHTS_NAME).read_bytes() == b"weights 1"
        tier.do("push", "a", 2)
    check(root, ("push", "a", 2))


# -- rot --------------------------------------------------------------------------------------------------------


def test_files_that_are_gone_and_come_back(root: Path):
    """A version whose files the disk lost stays a version; the same files pushed again are it."""
    with opened(root, url_of(root)) as tier:
        lost = tier.store.path(digest_of(1))
        for path in lost.iterdir():
            path.unlink()
        lost.rmdir()
        with pytest.raises(AdapterLoadFailed, match="gone. Push the adapter again"):
            tier.store.acquire(digest_of(1))
        tier.do("sweep", "", None)
        assert tier.registry.get("a").model_id == "a@2"
        with tier.store.stage() as staging:
            for file, data in ((CONFIG, b"config"), (WEIGHTS, b"weights 1")):
                with staging.open(file) as stream:
                    stream.write(data)
            assert CONTENT_OF[tier.store.commit(staging)] == 1
        with tier.store.hold(digest_of(1)):
            pass
    check(root)


def test_a_damaged_blob_is_replaced_by_the_next_push(root: Path):
    with opened(root, url_of(root)) as tier:
        tier.do("damage", "a", 1)
        assert tier.broken(tier.store.digests()) == {1}
        tier.do("push", "a", 1)
        assert not tier.broken(tier.store.digests())
    check(root)
