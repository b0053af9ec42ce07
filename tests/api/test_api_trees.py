"""Adapters that stand on others: a name means the sum along its path to the root."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import pytest
import torch
from folders import parts_of, save_adapter
from live import LiveServer, assert_error
from peft import PeftModel
from test_api_compositions import complete, text_of
from transformers import AutoModelForCausalLM

from loraplex.config import Settings
from loraplex.errors import StartupError
from loraplex.serving.watching import Watching

ECHO = {"max_tokens": 0, "echo": True, "logprobs": 0}


def push(client: httpx2.Client, name: str, folder: Path, parent: str | None = None) -> httpx2.Response:
    data = {"name": name} | ({} if parent is None else {"parent": parent})
    return client.post("/v1/adapters", data=data, files=parts_of(folder))


def pushed(client: httpx2.Client, name: str, folder: Path, parent: str | None = None) -> dict:
    reply = push(client, name, folder, parent)
    assert reply.status_code == 201, reply.text
    return reply.json()


@pytest.fixture(scope="module")
def folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trees")
    return {
        "root": save_adapter(base_folder, root / "root", seed=11, r=4),
        "mid": save_adapter(base_folder, root / "mid", seed=12, r=2, target_modules=["q_proj", "up_proj"]),
        "leaf": save_adapter(base_folder, root / "leaf", seed=13, r=8, target_modules=["v_proj", "down_proj"]),
        "twig": save_adapter(base_folder, root / "twig", seed=14, r=3),
        "dora": save_adapter(base_folder, root / "dora", seed=15, r=3, use_dora=True),
    }


@pytest.fixture
def server(make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[LiveServer]:
    """A fresh one: numbers of versions count from 1."""
    with LiveServer(make_settings(tmp_path / "data")) as server:
        yield server
        server.check_at_rest()


@pytest.fixture
def tree(client: httpx2.Client, folders: dict[str, Path]) -> None:
    pushed(client, "root", folders["root"])
    pushed(client, "mid", folders["mid"], "root")
    pushed(client, "leaf", folders["leaf"], "mid@1")


def logprobs(client: httpx2.Client, model: str, ids: list[int]) -> list[float]:
    return complete(client, model=model, prompt=ids, **ECHO)["choices"][0]["logprobs"]["token_logprobs"][1:]


class Summed:
    """PEFT with the folders' adapters, and their concatenations."""

    def __init__(self, base: Path, folders: dict[str, Path]):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        first, *others = folders
        self._model = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
        for name in others:
            self._model.load_adapter(folders[name], adapter_name=name)

    @torch.inference_mode()
    def logprobs(self, weights: dict[str, float], ids: list[int]) -> list[float]:
        name = "_".join(f"{name}{int(100 * scale)}" for name, scale in weights.items())
        self._model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
        self._model.set_adapter(name)
        expected = torch.log_softmax(self._model(torch.tensor([ids])).logits[0].double(), -1)
        return [expected[at, token].item() for at, token in enumerate(ids[1:])]


@pytest.fixture(scope="module")
def peft(base_folder: Path, folders: dict[str, Path]) -> Summed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Summed(base_folder, {name: folders[name] for name in ("root", "mid", "leaf", "twig")})


@pytest.mark.usefixtures("tree")
def test_a_path_is_pefts_concatenation(client, peft: Summed, folders, tokenizer):
    """Three adapters on a path, at a scale, beside others, and in a sum with another child of the same root."""
    pushed(client, "twig", folders["twig"], "root")
    ids = tokenizer.encode("pack my box with five dozen liquor jugs", add_special_tokens=False)
    cases = {
        "leaf": {"root": 1.0, "mid": 1.0, "leaf": 1.0},
        "leaf:0.5": {"root": 0.5, "mid": 0.5, "leaf": 0.5},
        "mid": {"root": 1.0, "mid": 1.0},
        "leaf:0.7+twig:0.6": {"root": 1.3, "mid": 0.7, "leaf": 0.7, "twig": 0.6},
    }
    for model, weights in cases.items():
        assert logprobs(client, model, ids) == pytest.approx(peft.logprobs(weights, ids), abs=1e-4), model
    without = logprobs(client, "leaf+mid:-1", ids)
    alone = pushed(client, "alone", folders["leaf"])
    assert without == logprobs(client, alone["id"], ids), "what is left is the one delta, to the last bit"


@pytest.mark.usefixtures("tree")
def test_a_tree_is_shown(client, folders):
    leaf = client.get("/v1/adapters/leaf").json()
    assert (leaf["parent"], leaf["path"], leaf["children"]) == ("mid@1", ["root@1", "mid@1", "leaf@1"], [])
    root = client.get("/v1/adapters/root").json()
    assert (root["parent"], root["path"], root["children"]) == (None, ["root@1"], ["mid@1"])
    rows = {row["name"]: row["parent"] for row in client.get("/v1/adapters").json()["data"]}
    assert (rows["root"], rows["mid"], rows["leaf"], rows["red"]) == (None, "root@1", "mid@1", None)
    cards = {card["id"]: card["parent"] for card in client.get("/v1/models").json()["data"]}
    assert (cards["root"], cards["mid"], cards["leaf"]) == ("base", "root@1", "mid@1")
    assert client.get("/v1/adapters/leaf/history").json()["data"][0]["parent"] == "mid@1"
    reply = pushed(client, "twig", folders["twig"], "leaf")
    assert reply["path"] == ["root@1", "mid@1", "leaf@1", "twig@1"]
    proof = reply["proof"]["path"]
    assert proof["adapters"] == ["root@1", "mid@1", "leaf@1"]
    assert proof["positions"] >= 20
    assert proof["from_base"]["max_kl"] >= proof["from_base"]["mean_kl"] > 0
    assert proof["from_parent"]["max_kl"] > 0
    assert proof["from_base"] != proof["from_parent"]
    assert "path" not in root["proof"]


@pytest.mark.usefixtures("tree")
def test_replies_and_the_cache_go_by_the_sum(client):
    prompt = [7 + number % 90 for number in range(40)]
    replies = [complete(client, model=model, prompt=prompt, max_tokens=4) for model in ("leaf", "leaf@1", "leaf:1")]
    assert {reply["model"] for reply in replies} == {"leaf@1"}
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    assert cached[0] == 0
    assert min(cached[1:]) >= 32
    for model in ("root", "mid", "leaf:0.5"):
        reply = complete(client, model=model, prompt=prompt, max_tokens=4)
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, model
    assert reply["model"] == "leaf@1:0.5"
    assert complete(client, model="leaf:0.5+mid:0.25+leaf:0.5", max_tokens=1)["model"] in (
        "leaf@1+mid@1:0.25",
        "mid@1:0.25+leaf@1",
    )
    assert complete(client, model="leaf+leaf:-1", max_tokens=1)["model"] == "base"


@pytest.mark.usefixtures("tree")
def test_paths_and_others_in_one_batch(client):
    models = ["leaf", "mid", "root", "leaf:0.5", "red", "leaf:0.25+blue:2", "base"]
    ask = [partial(text_of, client, model=model, max_tokens=8) for model in models]
    alone = [one() for one in ask]
    assert len(set(alone)) > 4
    with ThreadPoolExecutor(7) as pool:
        assert list(pool.map(lambda one: one(), ask * 2)) == alone * 2


@pytest.mark.usefixtures("tree")
def test_a_parent_stays_what_it_was(client, folders):
    before = text_of(client, model="leaf", max_tokens=8)
    pushed(client, "root", folders["twig"])
    assert text_of(client, model="leaf", max_tokens=8) == before
    assert client.post("/v1/adapters/root/rollback", json={}).status_code == 200
    again = push(client, "leaf", folders["leaf"], "mid")
    assert (again.status_code, again.json()["id"]) == (200, "leaf@1")
    other = pushed(client, "leaf", folders["leaf"], "root@2")
    assert (other["id"], other["path"]) == ("leaf@2", ["root@2", "leaf@2"])
    assert text_of(client, model="leaf", max_tokens=8) != before
    plain = pushed(client, "leaf", folders["leaf"], "base")
    assert (plain["id"], plain["parent"]) == ("leaf@3", None)
    assert text_of(client, model="leaf@1", max_tokens=8) == before


@pytest.mark.usefixtures("tree")
def test_a_parent_with_children_is_not_deleted(client, folders):
    for name in ("root", "root@1", "mid"):
        child = "mid@1" if name.startswith("root") else "leaf@1"
        error = client.delete(f"/v1/adapters/{name}")
        assert_error(error, 409, "adapter_has_children", f": {child}.", "Delete them first")
    error = client.post("/v1/unload_lora_adapter", json={"lora_name": "mid"})
    assert_error(error, 409, "adapter_has_children")
    assert client.delete("/v1/adapters/leaf").status_code == 200
    assert client.delete("/v1/adapters/mid").json()["deleted"] == ["mid@1"]


REFUSED = [
    ("new", "nobody", "unknown_parent", "no adapter 'nobody'"),
    ("new", "root@7", "unknown_parent", "no version 7"),
    ("root", "leaf", "invalid_parent", "root@1 or stands on it"),
    ("root", "root", "invalid_parent", "on a path twice"),
    ("new", "", "invalid_parent", "not a valid name"),
    ("new", "root+mid", "invalid_parent", "does not name one adapter"),
    ("new", "root:0.5", "invalid_parent", "does not name one adapter"),
    ("new", "to-root", "invalid_parent", "is a route"),
    ("new", "base@1", "unknown_parent", "base"),
    ("new", "x" * 300, "invalid_request", "too long"),
]


@pytest.mark.usefixtures("tree")
def test_what_cannot_be_a_parent(client, folders):
    route = client.put("/v1/routes/to-root", json={"targets": [{"model": "root", "weight": 1}]})
    assert route.status_code in (200, 201), route.text
    before = client.get("/v1/audit").json()["total"]
    for name, parent, code, words in REFUSED:
        assert_error(push(client, name, folders["twig"], parent), 400, code, words, param="parent")
    assert client.get("/v1/audit").json()["total"] == before


@pytest.mark.usefixtures("tree")
def test_a_path_has_a_limit(client, folders):
    pushed(client, "four", folders["twig"], "leaf")
    error = push(client, "five", folders["twig"], "four")
    assert_error(error, 400, "invalid_parent", "number 5 of its path", "at most 4", "--max-adapter-depth 5")


def test_only_deltas_stand_on_each_other(client, folders):
    pushed(client, "root", folders["root"])
    error = push(client, "dora", folders["dora"], "root")
    assert_error(error, 422, "adapter_invalid", "more than deltas", "without a parent")
    pushed(client, "dora", folders["dora"])
    error = push(client, "leaf", folders["leaf"], "dora")
    assert_error(error, 400, "invalid_parent", "dora@1 is more than deltas", param="parent")


@pytest.mark.usefixtures("tree")
def test_what_a_path_needs_is_brought_in_and_pinned(client):
    for name in ("leaf", "mid", "root"):
        assert client.get(f"/v1/adapters/{name}").json()["pinned"] is False
    assert client.post("/v1/adapters/leaf/prefetch", json={"to": "device"}).status_code == 200
    assert {client.get(f"/v1/adapters/{name}").json()["tier"] for name in ("leaf", "mid", "root")} == {"device"}
    assert client.post("/v1/adapters/leaf/pin").status_code == 200
    assert all(client.get(f"/v1/adapters/{name}").json()["pinned"] for name in ("leaf", "mid", "root"))
    assert client.post("/v1/adapters/leaf/unpin").status_code == 200
    assert not any(client.get(f"/v1/adapters/{name}").json()["pinned"] for name in ("leaf", "mid", "root"))


@pytest.mark.usefixtures("tree")
def test_a_parent_in_quarantine(client, server: LiveServer, folders):
    """What stands on it does not answer either, and says why; its files proven anew bring both back."""
    before = text_of(client, model="leaf", max_tokens=8)
    digest = client.get("/v1/adapters/root").json()["digest"]
    server.service.catalog.quarantine(digest, "it gave NaN.")
    for model in ("leaf", "mid:0.5+red"):
        reply = client.post("/v1/completions", json={"model": model, "prompt": "a"})
        assert_error(reply, 422, "adapter_quarantined", "'root@1', which is in quarantine: it gave NaN.")
    for parent in ("root", "leaf"):
        assert_error(push(client, "twig", folders["twig"], parent), 422, "adapter_quarantined", "root@1")
    assert push(client, "root", folders["root"]).status_code == 200
    assert text_of(client, model="leaf", max_tokens=8) == before


@pytest.mark.usefixtures("tree")
def test_routes_lead_to_trees(client):
    client.put("/v1/routes/prod", json={"targets": [{"model": "leaf", "weight": 1}]})
    reply = complete(client, model="prod", max_tokens=8)
    assert (reply["model"], reply["choices"][0]["text"]) == ("leaf@1", text_of(client, model="leaf", max_tokens=8))


def test_a_tree_is_there_after_a_restart(
    make_settings: Callable[..., Settings], tmp_path: Path, folders: dict[str, Path]
):
    settings = make_settings(tmp_path / "data", max_adapter_depth=2, merge="manual", max_loras=2)
    with LiveServer(settings) as server:
        client = server.client
        pushed(client, "root", folders["root"])
        pushed(client, "leaf", folders["leaf"], "root")
        error = push(client, "twig", folders["twig"], "leaf")
        assert_error(error, 400, "invalid_parent", "at most 2")
        assert_error(client.post("/v1/adapters/leaf/merge"), 409, "not_mergeable", "stands on root@1", "loraplex merge")
        before = text_of(client, model="leaf", max_tokens=8)
    with LiveServer(make_settings(tmp_path / "data", max_loras=2)) as server:
        client = server.client
        assert text_of(client, model="leaf", max_tokens=8) == before
        error = push(client, "twig", folders["twig"], "leaf")
        assert_error(error, 400, "invalid_parent", "needs 3 places", "--max-loras 3")
        server.check_at_rest()


def test_a_path_fits_into_ram(make_settings: Callable[..., Settings], tmp_path: Path, folders: dict[str, Path]):
    with LiveServer(make_settings(tmp_path / "one")) as server:
        nbytes = [pushed(server.client, name, folders[name])["report"]["bytes"]["ram"] for name in ("root", "leaf")]
    with LiveServer(make_settings(tmp_path / "two", adapter_cache_bytes=sum(nbytes) - 1)) as server:
        pushed(server.client, "root", folders["root"])
        error = push(server.client, "leaf", folders["leaf"], "root")
        assert_error(error, 413, "request_too_large", f"--adapter-cache-bytes {sum(nbytes)}", "root@1")
        server.check_at_rest()


# -- by other ways than an upload's form ------------------------------------------------------------------------


def place(folder: Path, name: str, files: Path, **profile: str) -> None:
    """An operator's folder; its profile may name its parent."""
    shutil.copytree(files, folder / name)
    if profile:
        (folder / name / "serving_profile.json").write_text(json.dumps(profile))


def parents(client: httpx2.Client) -> dict[str, str | None]:
    return {row["id"]: row["parent"] for row in client.get("/v1/adapters").json()["data"]}


def test_folders_name_their_parents(make_settings: Callable[..., Settings], tmp_path: Path, folders: dict[str, Path]):
    """In whatever order they lie there, at the start, and not anew at the next."""
    folder = tmp_path / "adapters"
    place(folder, "a-leaf", folders["leaf"], parent="b-mid@1")
    place(folder, "b-mid", folders["mid"], parent="c-root")
    place(folder, "c-root", folders["root"], parent="base")
    settings = make_settings(tmp_path / "data", adapters=folder)
    expected = {"a-leaf@1": "b-mid@1", "b-mid@1": "c-root@1", "c-root@1": None}
    with LiveServer(settings) as server:
        assert parents(server.client) == expected
        assert server.client.get("/v1/adapters/a-leaf").json()["profile"] == {"parent": "b-mid@1"}
        pushed(server.client, "c-root", folders["twig"])
    with LiveServer(settings) as server:
        expected = {"a-leaf@1": "b-mid@1", "b-mid@1": "c-root@1", "c-root@2": None}
        assert parents(server.client) == expected, "a restart pushes nothing onto the newer version"
        form = {"name": "a-leaf", "parent": "c-root@2"}
        parts = parts_of(folder / "a-leaf")
        parts["profile"] = ("serving_profile.json", (folder / "a-leaf" / "serving_profile.json").read_bytes())
        reply = server.client.post("/v1/adapters", data=form, files=parts).json()
        assert (reply["id"], reply["parent"]) == ("a-leaf@2", "c-root@2"), "a push knows better than its profile"


def test_folders_without_their_parent_are_not_served(
    make_settings: Callable[..., Settings], tmp_path: Path, folders: dict[str, Path]
):
    folder = tmp_path / "adapters"
    place(folder, "leaf", folders["leaf"], parent="mid")
    place(folder, "mid", folders["mid"], parent="leaf")
    with (
        pytest.raises(StartupError, match="'leaf' in .* cannot be served: The parent is not there"),
        LiveServer(make_settings(tmp_path / "data", adapters=folder)),
    ):
        pass


def test_a_watched_folder_waits_for_its_parent(
    make_settings: Callable[..., Settings], tmp_path: Path, folders: dict[str, Path]
):
    folder = tmp_path / "adapters"
    folder.mkdir()
    settings = make_settings(tmp_path / "data", adapters=folder, watch=True, watch_interval=3600.0)
    with LiveServer(settings) as server:
        watching = Watching(folder, server.service.fetching, 3600.0)
        server.call(watching.seed())
        place(folder, "leaf", folders["leaf"], parent="root")
        for _ in range(3):
            server.call(watching.look())
        assert parents(server.client) == {}
        place(folder, "root", folders["root"])
        for _ in range(3):
            server.call(watching.look())
        assert parents(server.client) == {"leaf@1": "root@1", "root@1": None}


def test_a_source_with_a_parent(make_settings: Callable[..., Settings], tmp_path: Path, folders: dict[str, Path]):
    settings = make_settings(tmp_path / "data", allow_adapter_root=[folders["root"].parent])
    with LiveServer(settings) as server:
        client = server.client
        pushed(client, "root", folders["root"])
        asked = {"name": "leaf", "source": str(folders["leaf"]), "parent": "root"}
        reply = client.post("/v1/adapters", json=asked)
        assert reply.status_code == 201, reply.text
        assert (reply.json()["parent"], reply.json()["path"]) == ("root@1", ["root@1", "leaf@1"])
        error = client.post("/v1/adapters", json={**asked, "parent": "nobody"})
        assert_error(error, 400, "unknown_parent", "nobody", param="parent")
        server.check_at_rest()
