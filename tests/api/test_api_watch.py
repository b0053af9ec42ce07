"""A watched folder of adapters, round by round."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import LiveServer
from structlog.testing import capture_logs

from loraplex.config import Settings
from loraplex.errors import StartupError
from loraplex.serving.watching import Watching

NEVER = 3600.0


@pytest.fixture
def watched(make_settings: Callable[..., Settings], adapter_folders: dict[str, Path], tmp_path: Path) -> Iterator:
    folder = tmp_path / "adapters"
    shutil.copytree(adapter_folders["red"], folder / "red")
    (folder / "linked").symlink_to(adapter_folders["blue"])
    settings = make_settings(tmp_path / "data", adapters=folder, watch=True, watch_interval=NEVER)
    with LiveServer(settings) as server:
        watching = Watching(folder, server.service.fetching, NEVER)
        server.call(watching.seed())
        yield server, folder, lambda: server.call(watching.look())
        server.check_at_rest()


def models(server: LiveServer) -> dict[str, int]:
    return {row["name"]: row["version"] for row in server.client.get("/v1/adapters").json()["data"]}


def test_new_and_changed_folders_become_versions(watched, adapter_folders: dict[str, Path]):
    server, folder, look = watched
    assert models(server) == {"red": 1}, "links are refused at the start, too"
    shutil.copytree(adapter_folders["green"], folder / "green")
    look()
    assert models(server) == {"red": 1}, "it may still be being written"
    look()
    assert models(server) == {"red": 1, "green": 1}
    assert server.client.get("/v1/adapters/green").json()["source"] == "folder:green"
    shutil.copytree(adapter_folders["grey"], folder / "red", dirs_exist_ok=True)
    look()
    look()
    assert models(server) == {"red": 2, "green": 1}
    shutil.copytree(adapter_folders["red"], folder / "red", dirs_exist_ok=True)
    look()
    look()
    assert models(server) == {"red": 1, "green": 1}, "the earlier files are the earlier version"
    os.utime(folder / "green" / "adapter_config.json")
    look()
    look()
    assert models(server)["green"] == 1, "touched, and not changed"
    trail = server.client.get("/v1/adapters/red/history").json()["data"]
    assert {row["who"] for row in trail} == {"operator"}


def test_a_folder_that_keeps_changing_is_left_alone(watched, adapter_folders: dict[str, Path]):
    server, folder, look = watched
    (folder / "green").mkdir()
    weights = (adapter_folders["green"] / "adapter_model.safetensors").read_bytes()
    shutil.copy(adapter_folders["green"] / "adapter_config.json", folder / "green")
    look()
    for size in (100, 1000, len(weights)):
        (folder / "green" / "adapter_model.safetensors").write_bytes(weights[:size])
        look()
        assert "green" not in models(server)
    look()
    assert models(server)["green"] == 1


def test_a_folder_that_is_gone_deletes_nothing(watched):
    server, folder, look = watched
    shutil.rmtree(folder / "red")
    with capture_logs() as logs:
        look()
        look()
    assert models(server) == {"red": 1}
    assert [line["by"] for line in logs if "gone" in line["event"]] == ["loraplex rm red"], "said once"


def test_links_and_faults_are_told_once(watched, adapter_folders: dict[str, Path]):
    server, folder, look = watched
    shutil.copytree(adapter_folders["green"], folder / "green")
    (folder / "green" / "adapter_model.safetensors").unlink()
    (folder / "green" / "adapter_model.safetensors").symlink_to(adapter_folders["green"] / "adapter_model.safetensors")
    shutil.copytree(adapter_folders["green"], folder / "broken")
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"nonsense" * 20)
    shutil.copytree(adapter_folders["green"], folder / "no@name")
    with capture_logs() as logs:
        for _ in range(4):
            look()
    told = sorted(line["name"] for line in logs if line["event"] == "a folder is not served")
    assert told == ["broken", "green", "no@name"]
    assert models(server) == {"red": 1}
    shutil.copytree(adapter_folders["grey"], folder / "broken", dirs_exist_ok=True)
    look()
    look()
    assert models(server) == {"red": 1, "broken": 1}, "mended"


def test_the_watch_runs_by_itself(make_settings, adapter_folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    with LiveServer(make_settings(tmp_path / "d", adapters=folder, watch=True, watch_interval=0.05)) as server:
        shutil.copytree(adapter_folders["green"], folder / "green")
        server.wait_until(lambda: models(server) == {"green": 1}, "taking the folder")


def test_watching_needs_a_folder(make_settings, tmp_path: Path):
    with pytest.raises(StartupError, match="--adapters DIR"):
        make_settings(tmp_path, adapters=None, watch=True)
