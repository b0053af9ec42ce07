"""The store: nothing or a whole durable blob, whatever fails in between; holds keep blobs from the sweep."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from peft_folders import Adapter

from loraplex.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterTooLarge,
    InvalidRequest,
    PickleRefused,
    StartupError,
    StorageFull,
)
from loraplex.lora.digest import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, adapter_digest
from loraplex.lora.files import CHAT_TEMPLATE, CONFIG, PROFILE, TEXT_FILES, WEIGHTS
from loraplex.lora.staging import Staging
from loraplex.lora.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path):
    with AdapterStore(tmp_path / "data") as store:
        yield store
        store.check_integrity()
        assert not staged(store), "staging is empty when nothing is on its way"


def staged(store: AdapterStore) -> list[Path]:
    return list((store.blobs.parent / "staging").iterdir())


def fill(staging: Staging, config: bytes = b"config", weights: bytes = b"weights") -> None:
    with staging.open(CONFIG) as file:
        file.write(config)
    with staging.open(WEIGHTS) as file:
        for at in range(0, len(weights), 3):
            file.write(weights[at : at + 3])


def put(store: AdapterStore, weights: bytes = b"weights") -> str:
    with store.stage() as staging:
        fill(staging, weights=weights)
        return store.commit(staging)


def test_an_upload_becomes_a_blob(store: AdapterStore):
    with store.stage() as staging:
        fill(staging)
        folder = staging.folder
        digest = store.commit(staging)
        assert digest == staging.digest
        assert staging.folder == store.path(digest)
    assert not folder.exists()
    assert (store.path(digest) / CONFIG_NAME).read_bytes() == b"config"
    assert (store.path(digest) / WEIGHTS_NAME).read_bytes() == b"weights"
    assert store.digests() == {digest}


def test_the_reader_reads_what_the_store_holds(store: AdapterStore, llama_adapter: Adapter):
    from loraplex.lora.reader import AdapterReader

    reader = AdapterReader(store.blobs, llama_adapter.base.targets, __import__("torch").float32, 64)
    with store.stage() as staging:
        config, weights = ((llama_adapter.folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))
        fill(staging, config, weights)
        assert reader.check(staging.folder).digest == staging.digest
        digest = store.commit(staging)
    assert reader.read(digest).digest == digest


def test_commit_is_idempotent(store: AdapterStore):
    first = put(store)
    inode = (store.path(first) / WEIGHTS_NAME).stat().st_ino
    assert put(store) == first
    assert (store.path(first) / WEIGHTS_NAME).stat().st_ino == inode
    with store.stage() as staging:
        fill(staging)
        assert store.commit(staging) == store.commit(staging) == first


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_blob_is_repaired_by_another_upload(store: AdapterStore, damage: str):
    weights = store.path(put(store)) / WEIGHTS_NAME
    weights.write_bytes(b"weighty") if damage == "flip" else weights.unlink()
    put(store)
    assert weights.read_bytes() == b"weights"


def test_what_is_not_committed_is_gone(store: AdapterStore):
    with store.stage() as staging:
        fill(staging)

    def break_off() -> None:
        with store.stage() as staging, staging.open(CONFIG) as file:
            file.write(b"half")
            raise RuntimeError("the client went")

    with pytest.raises(RuntimeError, match="the client went"):
        break_off()
    assert not store.digests()


def test_both_files_are_needed(store: AdapterStore):
    with store.stage() as staging:
        with staging.open(CONFIG) as file:
            file.write(b"config")
        with pytest.raises(AdapterInvalid, match=WEIGHTS_NAME):
            store.commit(staging)
    with store.stage() as staging:
        with pytest.raises(RuntimeError), staging.open(CONFIG) as file:
            raise RuntimeError
        with staging.open(WEIGHTS) as file:
            file.write(b"weights")
        with pytest.raises(AdapterInvalid, match=CONFIG_NAME):
            store.commit(staging)


def test_size_limits(tmp_path: Path):
    with AdapterStore(tmp_path, max_weights_bytes=10) as store, store.stage() as staging:
        with staging.open(WEIGHTS) as file:
            file.write(b"12345")
            with pytest.raises(AdapterTooLarge, match="10 bytes"):
                file.write(b"123456")
        assert (staging.folder / WEIGHTS_NAME).stat().st_size == 5
        with pytest.raises(AdapterTooLarge, match=CONFIG_NAME), staging.open(CONFIG) as file:
            file.write(bytes(MAX_CONFIG_BYTES + 1))


def test_free_space_is_kept(tmp_path: Path):
    with AdapterStore(tmp_path, min_free_bytes=1 << 60) as store:
        with pytest.raises(StorageFull, match="less than [0-9]+ MiB"), store.stage():
            raise AssertionError("not reached")


def test_leftovers_are_swept_at_start(tmp_path: Path):
    with AdapterStore(tmp_path) as store:
        digest = put(store)
    left = tmp_path / "staging" / "left"
    left.mkdir()
    (left / WEIGHTS_NAME).write_bytes(b"half")
    (tmp_path / "staging" / "file").write_bytes(b"")
    (tmp_path / "staging" / "link").symlink_to(tmp_path / "blobs")
    with AdapterStore(tmp_path) as store:
        assert not staged(store)
        assert store.digests() == {digest}


def test_a_folder_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StartupError, match="--data-dir"):
        AdapterStore(tmp_path / "file")


def test_sweep_keeps_live_and_held(store: AdapterStore):
    live, held, unused = (put(store, weights) for weights in (b"live", b"held", b"unused"))
    other = store.blobs / "not-a-digest"
    other.mkdir()
    with store.hold(held) as folder, store.hold(held):
        assert store.sweep(lambda: {live}) == [unused]
        assert folder.is_dir()
    assert store.sweep(lambda: {live}) == [held]
    assert store.digests() == {live}
    other.rmdir()


def test_a_committed_blob_is_held_until_its_stage_ends(store: AdapterStore):
    with store.stage() as staging:
        fill(staging)
        digest = store.commit(staging)
        assert store.sweep(frozenset) == []
    assert store.sweep(frozenset) == [digest]


def test_holding_what_is_gone(store: AdapterStore):
    with pytest.raises(AdapterLoadFailed, match="gone"):
        store.acquire("0" * 64)
    with pytest.raises(AssertionError):
        store.release("0" * 64)


@pytest.mark.parametrize("digest", ["", "..", "../" + "0" * 61, "A" * 64, "0" * 65, "0" * 64 + "/x", "0" * 63 + "\n"])
def test_only_digests_become_paths(store: AdapterStore, digest: str):
    for use in (store.path, store.acquire):
        with pytest.raises(InvalidRequest, match="not a digest"):
            use(digest)


class TestImport:
    def test_a_folder(self, store: AdapterStore, llama_adapter: Adapter):
        with store.import_folder(llama_adapter.folder) as staging:
            digest = store.commit(staging)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            source = llama_adapter.folder / name
            assert (store.path(digest) / name).read_bytes() == source.read_bytes()
            assert not (store.path(digest) / name).samefile(source)

    def test_again_copies_nothing(self, store: AdapterStore, llama_adapter: Adapter):
        with store.import_folder(llama_adapter.folder) as staging:
            digest = store.commit(staging)
        with store.import_folder(llama_adapter.folder) as staging:
            assert staging.folder == store.path(digest)
            assert not staged(store)
            assert store.commit(staging) == digest
            assert store.sweep(frozenset) == []

    def test_links_are_the_operators_choice(self, store: AdapterStore, llama_adapter: Adapter, tmp_path: Path):
        links = tmp_path / "links"
        links.mkdir()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            (links / name).symlink_to(llama_adapter.folder / name)
        (tmp_path / "link").symlink_to(links)
        with store.import_folder(tmp_path / "link") as staging:
            store.commit(staging)

    def test_what_is_no_adapter(self, store: AdapterStore, adapter: Adapter):
        def refuses(kind: type[Exception], match: str) -> None:
            with pytest.raises(kind, match=match), store.import_folder(adapter.folder):
                raise AssertionError("not reached")

        (adapter.folder / WEIGHTS_NAME).rename(adapter.folder / "adapter_model.bin")
        refuses(PickleRefused, "adapter_model.bin")
        (adapter.folder / "adapter_model.bin").unlink()
        refuses(AdapterInvalid, WEIGHTS_NAME)
        os.mkfifo(adapter.folder / WEIGHTS_NAME)
        refuses(AdapterInvalid, "not a regular file")
        shutil.rmtree(adapter.folder)
        refuses(AdapterInvalid, "not a folder")


DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError(errno.EIO, "Input/output error"),
]


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open", "mkdir"])
@pytest.mark.parametrize("cause", DISK, ids=["full", "read-only", "broken"])
def test_a_disk_that_refuses(store: AdapterStore, monkeypatch: pytest.MonkeyPatch, call: str, cause: OSError):
    """At every step: StorageFull that says why, nothing half done is seen, and it works again afterwards."""
    real_open = os.open

    def refuse(*arguments: Any, **_: Any) -> Any:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real_open(*arguments)
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StorageFull, match=cause.strerror):
            put(store)
    assert not store.digests()
    put(store)


def test_a_sync_of_the_folder_that_fails_after_the_rename(store: AdapterStore, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> None:
        if path == store.blobs:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("loraplex.lora.store.fsync_folder", refuse)
        with pytest.raises(StorageFull):
            put(store)
    # the blob is whole but perhaps not durable: nobody was told of it, and the next upload or sweep settles it
    (digest,) = store.digests()
    assert put(store) == digest
    assert store.sweep(frozenset) == [digest]


def test_durable_order(store: AdapterStore, monkeypatch: pytest.MonkeyPatch):
    """Both files, then their folder, are synced before the rename; the folder of blobs after it."""
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(fd: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def spy_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    with store.stage() as staging:
        folder = staging.folder.name
        fill(staging)
        store.commit(staging)
    assert steps == [CONFIG_NAME, WEIGHTS_NAME, folder, "rename", "blobs"]


KILLED = """
import os, sys
from pathlib import Path
from loraplex.lora.files import CONFIG, WEIGHTS
from loraplex.lora.store import AdapterStore
calls, limit = 0, int(sys.argv[2])
def dying(real):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls > limit:
            os.kill(os.getpid(), 9)
        return real(*arguments, **keywords)
    return call
with AdapterStore(Path(sys.argv[1])) as store:
    for name in ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    with store.stage() as staging:
        with staging.open(CONFIG) as file:
            file.write(b"config")
        with staging.open(WEIGHTS) as file:
            file.write(b"weights")
        print(store.commit(staging), flush=True)
"""


def test_killed_at_any_step(tmp_path: Path):
    """A process killed before its n-th system call leaves nothing or a whole blob; what it reported is there."""
    reported = ""
    for limit in range(40):
        root = tmp_path / str(limit)
        run = subprocess.run(
            [sys.executable, "-c", KILLED, str(root), str(limit)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        reported = run.stdout.strip()
        with AdapterStore(root) as store:
            assert not staged(store)
            assert not reported or store.digests() == {reported}
            store.check_integrity()
            put(store)
        if run.returncode == 0:
            break
    assert limit > 12, "every step was tried"
    assert reported, "the last run was not killed"


def test_threads(store: AdapterStore):
    """Uploads of few adapters, holds and sweeps at once: no error, and every hold sees whole files."""
    live: set[str] = set()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(15):
                with store.stage() as staging:
                    fill(staging, weights=b"%d" % ((seed + step) % 3))
                    digest = store.commit(staging)
                    with store.hold(digest) as folder:
                        if step % 4 == 0:
                            store.sweep(lambda: frozenset(live))
                        assert (folder / WEIGHTS_NAME).stat().st_size == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store.sweep(frozenset)
    assert not store.digests()


def test_a_sweep_that_the_disk_refuses(store: AdapterStore, monkeypatch: pytest.MonkeyPatch):
    digest = put(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(DISK[1]))
        with pytest.raises(StorageFull, match="removal"):
            store.sweep(frozenset)
    assert store.digests() == {digest}
    assert store.sweep(frozenset) == [digest]


def test_a_source_that_breaks_while_it_is_copied(
    store: AdapterStore, llama_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
):
    def broken(_: int) -> Any:
        yield b"some"
        raise DISK[2]

    with monkeypatch.context() as patch:
        patch.setattr("loraplex.lora.store.read_chunks", broken)
        with pytest.raises(AdapterInvalid, match="Input/output"), store.import_folder(llama_adapter.folder):
            raise AssertionError("not reached")


def test_the_digest_of_two_files_is_what_it_was(store: AdapterStore):
    two = hashlib.sha256(hashlib.sha256(b"config").digest() + hashlib.sha256(b"weights").digest()).hexdigest()
    assert put(store) == two
    assert adapter_digest(hashlib.sha256(b"config").digest(), hashlib.sha256(b"weights").digest(), {}) == two


def test_every_further_file_counts_by_name_and_content(store: AdapterStore):
    digests = {put(store)}
    for file in TEXT_FILES:
        for content in (b"one", b"two", b""):
            with store.stage() as staging:
                fill(staging)
                with staging.open(file) as stream:
                    stream.write(content)
                digests.add(store.commit(staging))
                assert staging.text_files == {file.name: hashlib.sha256(content).hexdigest()}
                assert (staging.folder / file.name).read_bytes() == content
    assert len(digests) == 1 + 3 * len(TEXT_FILES)
    assert store.digests() == digests


def test_what_nobody_needs_is_left_out(store: AdapterStore):
    with store.stage() as staging:
        fill(staging)
        for file in (PROFILE, CHAT_TEMPLATE):
            with staging.open(file) as stream:
                stream.write(b"{}")
        with_both = staging.digest
        staging.leave_out([PROFILE.name, "tokenizer.json"])
        assert staging.digest != with_both
        store.commit(staging)
        assert sorted(path.name for path in staging.folder.iterdir()) == [CONFIG.name, WEIGHTS.name, CHAT_TEMPLATE.name]


def test_a_folder_brings_the_files_of_the_list_alone(store: AdapterStore, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (CONFIG.name, WEIGHTS.name, PROFILE.name, "tokenizer.json", "README.md", "optimizer.pt"):
        (folder / name).write_bytes(name.encode())
    with store.import_folder(folder, ["tokenizer.json"]) as staging:
        digest = store.commit(staging)
        assert {path.name for path in staging.folder.iterdir()} == {CONFIG.name, WEIGHTS.name, PROFILE.name}
    with store.import_folder(folder, ["tokenizer.json"]) as staging:
        assert (staging.digest, staging.folder) == (digest, store.path(digest))
        assert staging.text_files.keys() == {PROFILE.name}
    (folder / PROFILE.name).write_bytes(b"changed")
    with store.import_folder(folder, ["tokenizer.json"]) as staging:
        assert store.commit(staging) != digest
    (folder / PROFILE.name).write_bytes(bytes((PROFILE.max_bytes or 0) + 1))
    with pytest.raises(AdapterTooLarge, match="it need not be there"), store.import_folder(folder) as staging:
        pass
