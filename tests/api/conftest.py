from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from folders import Files, make_tokenizer, save_adapter, save_base
from live import LiveServer

from loraplex.config import Settings, prepare_process

prepare_process()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """red and blue are served from the start; green and grey are there to be pushed."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "red": save_adapter(base_folder, root / "served" / "red", seed=1, r=4),
        "blue": save_adapter(base_folder, root / "served" / "blue", seed=2, r=8, target_modules=["q_proj", "up_proj"]),
        "green": save_adapter(base_folder, root / "green", seed=3, r=2),
        "grey": save_adapter(base_folder, root / "grey", seed=4, r=2),
    }


@pytest.fixture(scope="session")
def make_settings(base_folder: Path, adapter_folders: dict[str, Path]) -> Callable[..., Settings]:
    def make(data_dir: Path, **changes) -> Settings:
        settings = {
            "model": base_folder,
            "adapters": adapter_folders["red"].parent,
            "data_dir": data_dir,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "max_loras": 4,
            "max_lora_rank": 16,
            "adapter_cache_bytes": 8 << 20,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 64,
            "max_waiting": 16,
            "max_upload_bytes": 4 << 20,
            **changes,
        }
        return Settings.load(settings)

    return make


@pytest.fixture(scope="session")
def session_server(make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory):
    with LiveServer(make_settings(tmp_path_factory.mktemp("data"))) as server:
        yield server


@pytest.fixture
def server(session_server: LiveServer) -> Iterator[LiveServer]:
    """The shared server. After each test it must be at rest and answer."""
    yield session_server
    session_server.check_at_rest()


@pytest.fixture
def client(server: LiveServer) -> httpx2.Client:
    return server.client


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def green(adapter_folders: dict[str, Path]) -> Files:
    """A good adapter, to be spoilt."""
    return Files(adapter_folders["green"])
