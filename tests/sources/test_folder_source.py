"""Folders below an allowed root: what is read, and that nothing else ever is."""

import os
from pathlib import Path

import pytest

from loraplex.errors import AdapterInvalid, AdapterTooLarge, PickleRefused, SourceFailed, SourceNotFound, SourceRefused
from loraplex.lora.files import WEIGHTS
from loraplex.lora.store import AdapterStore
from loraplex.sources.allow_list import AllowList
from loraplex.sources.transfer import Transfer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "team" / "sql"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 3000)
    (folder / "optimizer.pt").write_bytes(b"not looked at")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "adapter_config.json").write_bytes(b"secret")
    (tmp_path / "secret" / "adapter_model.safetensors").write_bytes(b"secret")
    return tmp_path / "root"


def fetch(store: AdapterStore, root: Path, text: object, max_weights_bytes: int = 1 << 20) -> dict[str, bytes]:
    source = AllowList([root]).source(str(text))
    transfer = Transfer("sql", source.shown, max_weights_bytes=max_weights_bytes, timeout=60)
    with store.stage() as staging:
        source.fetch(staging, transfer)
        assert transfer.bytes_done == transfer.bytes_total
        return {path.name: path.read_bytes() for path in staging.folder.iterdir()}


def test_a_folder_is_copied(store: AdapterStore, root: Path):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 3000}
    assert fetch(store, root, root / "team" / "sql") == files
    assert fetch(store, root, "team/sql") == files, "relative to the root"
    assert fetch(store, root, "./team//sql/") == files
    (root / "team" / "sql" / "chat_template.jinja").write_bytes(b"hi")
    assert fetch(store, root, "team/sql") == {**files, "chat_template.jinja": b"hi"}


def test_the_root_itself_may_be_reached_by_a_link(store: AdapterStore, root: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(root)
    assert fetch(store, link, link / "team" / "sql")
    assert fetch(store, link, root / "team" / "sql")


@pytest.mark.parametrize(
    "text",
    ["/etc", "../secret", "team/../../secret", "/", "", "a\nb", "x" * 2000, "file:///etc", "ftp://host/x", "\0"],
)
def test_what_lies_elsewhere_is_refused(store: AdapterStore, root: Path, text: str):
    with pytest.raises(SourceRefused):
        fetch(store, root, text)


def test_a_neighbour_with_the_same_beginning_is_elsewhere(store: AdapterStore, root: Path, tmp_path: Path):
    (tmp_path / "root-2").mkdir()
    with pytest.raises(SourceRefused):
        fetch(store, root, tmp_path / "root-2")


def test_nothing_is_allowed_without_a_root():
    with pytest.raises(SourceRefused, match="--allow-adapter-root"):
        AllowList([]).source("/anything")


def test_links_are_not_followed(store: AdapterStore, root: Path, tmp_path: Path):
    (root / "away").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceRefused, match="symbolic link"):
        fetch(store, root, "away")
    (root / "deep").symlink_to(root / "team")
    with pytest.raises(SourceRefused, match="symbolic link"):
        fetch(store, root, "deep/sql")
    weights = root / "team" / "sql" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "secret" / "adapter_model.safetensors")
    with pytest.raises(SourceRefused, match="symbolic link"):
        fetch(store, root, "team/sql")


def test_what_is_no_adapter(store: AdapterStore, root: Path):
    with pytest.raises(SourceNotFound):
        fetch(store, root, "team/nothing")
    with pytest.raises(AdapterInvalid, match="adapter_config.json and adapter_model.safetensors"):
        fetch(store, root, "team")
    folder = root / "team" / "sql"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(PickleRefused):
        fetch(store, root, "team/sql")
    (folder / "adapter_model.bin").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(SourceRefused, match="no regular file"):
        fetch(store, root, "team/sql")


def test_too_large_is_known_before_the_first_byte(store: AdapterStore, root: Path):
    with pytest.raises(AdapterTooLarge, match=r"3000 bytes.*at most 2999.*max_upload_bytes"):
        fetch(store, root, "team/sql", max_weights_bytes=2999)


def transfer_of(size: int, chunks: list[bytes], store: AdapterStore, now: list[float] | None = None) -> int:
    transfer = Transfer("x", "there", max_weights_bytes=100, timeout=10, clock=lambda: now[0] if now else 0.0)

    def given():
        for chunk in chunks:
            yield chunk
            if now:
                now[0] += 6

    with store.stage() as staging:
        transfer.write(staging, WEIGHTS, size, given())
    return transfer.bytes_done


def test_a_transfer_is_bounded_in_size_and_time(store: AdapterStore):
    assert transfer_of(4, [b"ab", b"cd"], store) == 4
    with pytest.raises(SourceFailed, match="ended after 2 of 4"):
        transfer_of(4, [b"ab"], store)
    with pytest.raises(SourceFailed, match="more bytes than the 4"):
        transfer_of(4, [b"ab", b"cde"], store)
    with pytest.raises(SourceFailed, match="--fetch-timeout"):
        transfer_of(6, [b"ab", b"cd", b"ef"], store, now=[0.0])
    with store.stage() as staging:
        stopped = Transfer("x", "there", max_weights_bytes=100, timeout=10)
        stopped.stop()
        with pytest.raises(SourceFailed, match="stopped"):
            stopped.write(staging, WEIGHTS, 2, [b"ab"])
