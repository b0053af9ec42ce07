from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraplex.lora.store import AdapterStore
from loraplex.sources.source import Source
from loraplex.sources.transfer import Transfer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "data") as store:
        yield store


@pytest.fixture
def fetched(store: AdapterStore) -> Callable[..., dict[str, bytes]]:
    """Fetches a source into a fresh staging and returns its files."""

    def fetch(source: Source, max_weights_bytes: int = 1 << 24) -> dict[str, bytes]:
        transfer = Transfer("x", source.shown, max_weights_bytes=max_weights_bytes, timeout=60)
        with store.stage() as staging:
            source.fetch(staging, transfer)
            assert transfer.bytes_done == transfer.bytes_total
            return {path.name: path.read_bytes() for path in staging.folder.iterdir()}

    return fetch
