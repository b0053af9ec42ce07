"""An adapter answers after its proof and not before; one that gives NaN while it runs goes into quarantine."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch
from folders import parts_of
from live import LiveServer, assert_error
from safetensors.torch import load_file, save_file
from test_api_completions import text_of

from loraplex.engine.proof_result import ProofResult


def push(client: httpx2.Client, name: str, folder: Path) -> httpx2.Response:
    return client.post("/v1/adapters", data={"name": name}, files=parts_of(folder))


@pytest.fixture
def cleaned(server: LiveServer):
    kept = set(server.service.catalog.names())
    yield
    for row in server.client.get("/v1/adapters").json()["data"]:
        if row["name"] not in kept:
            assert server.client.delete(f"/v1/adapters/{row['name']}").status_code == 200


@pytest.fixture
def overflowing(adapter_folders: dict[str, Path], tmp_path: Path) -> Path:
    """Finite numbers whose products are not."""
    folder = tmp_path / "overflowing"
    shutil.copytree(adapter_folders["green"], folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: torch.full_like(one, 3e38) for key, one in load_file(weights).items()}, weights)
    return folder


@pytest.fixture(scope="module")
def unproven(make_settings, tmp_path_factory):
    """A server that proves nothing."""
    with LiveServer(make_settings(tmp_path_factory.mktemp("unproven"), proof="off")) as server:
        yield server


class Proofs:
    """The proofs of a server: how many there were, and a gate before their next slice."""

    def __init__(self, server: LiveServer, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        self.is_open = True
        self.is_waiting = False
        proofs = server.engine.proofs
        add, advance = proofs.add, proofs._advance

        def counted(*arguments) -> None:
            self.count += 1
            add(*arguments)

        def gated(job) -> ProofResult | None:
            if self.is_open:
                return advance(job)
            self.is_waiting = proofs.is_waiting = True
            return None

        monkeypatch.setattr(proofs, "add", counted)
        monkeypatch.setattr(proofs, "_advance", gated)


@pytest.mark.usefixtures("cleaned")
class TestProof:
    def test_until_then_the_name_means_what_it_meant(self, server, client, adapter_folders, monkeypatch):
        push(client, "until", adapter_folders["green"])
        first = text_of(client, model="until", max_tokens=12)
        proofs = Proofs(server, monkeypatch)
        proofs.is_open = False
        with ThreadPoolExecutor() as pool:
            try:
                pushing = pool.submit(push, client, "until", adapter_folders["grey"])
                server.wait_until(lambda: proofs.is_waiting, "a proof that waits")
                assert text_of(client, model="until", max_tokens=12) == first
                assert client.get("/v1/adapters/until").json()["versions"] == [1]
                assert_error(
                    client.post("/v1/completions", json={"model": "until@2", "prompt": "a"}), 404, "model_not_found"
                )
            finally:
                proofs.is_open = True
            assert pushing.result().status_code == 201
        assert client.get("/v1/adapters/until").json()["versions"] == [2, 1]
        assert text_of(client, model="until", max_tokens=12) != first

    def test_one_that_fails_never_answers(self, server, client, adapter_folders, overflowing):
        push(client, "failing", adapter_folders["green"])
        first = text_of(client, model="failing", max_tokens=12)
        blobs = server.service.catalog.store.digests()
        assert_error(push(client, "failing", overflowing), 422, "proof_failed", "NaN or infinity", param="weights")
        assert_error(push(client, "failing-too", overflowing), 422, "proof_failed")
        assert text_of(client, model="failing", max_tokens=12) == first
        assert client.get("/v1/adapters/failing").json()["versions"] == [1]
        assert_error(client.get("/v1/adapters/failing-too"), 404, "model_not_found")
        assert server.service.catalog.store.digests() == blobs

    def test_the_same_files_are_proven_once(self, server, client, adapter_folders, monkeypatch):
        proofs = Proofs(server, monkeypatch)
        one = push(client, "one", adapter_folders["green"]).json()
        other = push(client, "other", adapter_folders["green"]).json()
        again = push(client, "one", adapter_folders["green"])
        assert again.status_code == 200
        assert proofs.count == 1
        assert one["proof"] == other["proof"] == again.json()["proof"]
        client.delete("/v1/adapters/one")
        client.delete("/v1/adapters/other")
        assert push(client, "one", adapter_folders["green"]).json()["proof"]["passed"]
        assert proofs.count == 2, "with its last version the proof is gone"

    def test_a_proof_that_finds_no_time(self, server, client, adapter_folders, monkeypatch):
        proofs = Proofs(server, monkeypatch)
        blobs = server.service.catalog.store.digests()
        monkeypatch.setattr(server.service.acceptance, "_proof_timeout", 1e-9)
        reply = push(client, "late", adapter_folders["green"])
        assert_error(reply, 503, "proof_timeout", "--proof-timeout", "Send it again")
        assert int(reply.headers["retry-after"]) > 0
        assert server.service.catalog.store.digests() == blobs
        monkeypatch.undo()
        assert proofs.count == 1
        assert push(client, "late", adapter_folders["green"]).status_code == 201

    def test_a_disk_that_cannot_be_read_back(self, server, client, adapter_folders, monkeypatch):
        def broken(*arguments):
            raise OSError("gone")

        monkeypatch.setattr(server.engine.loads, "_read", broken)
        reply = push(client, "unread", adapter_folders["green"])
        assert_error(reply, 500, "adapter_load_failed", "gone")
        assert_error(client.get("/v1/adapters/unread"), 404, "model_not_found")

    def test_streams_go_on_beside_it(self, server, client, adapter_folders):
        """Uploads while requests run: every answer is that of the request alone."""
        prompts = {name: text_of(client, model=name, max_tokens=60) for name in ("base", "red", "blue")}
        with ThreadPoolExecutor(8) as pool:
            answers = [(name, pool.submit(text_of, client, model=name, max_tokens=60)) for name in [*prompts] * 3]
            pushes = [
                pool.submit(push, client, f"p{i}", adapter_folders["green" if i % 2 else "grey"]) for i in range(4)
            ]
            assert {push.result().status_code for push in pushes} == {201}
            for name, answer in answers:
                assert answer.result() == prompts[name]

    def test_a_version_from_before_proofs_gets_one_when_it_is_pushed_again(self, server, client, adapter_folders):
        from sqlalchemy import update

        from loraplex.lora.tables import versions

        push(client, "old", adapter_folders["green"])
        forget = update(versions).where(versions.c.name == "old").values(proof=None, report=None)
        server.service.catalog.registry._database.write(lambda connection: connection.execute(forget))
        assert client.get("/v1/adapters/old").json()["proof"] is None
        assert push(client, "old", adapter_folders["green"]).status_code == 200
        detail = client.get("/v1/adapters/old").json()
        assert (detail["versions"], detail["proof"]["passed"], detail["report"]["matched"]) == ([1], True, 6)


def test_a_restart_proves_nothing_again(make_settings, adapter_folders, tmp_path, monkeypatch):
    from loraplex.engine.adapter_proofs import AdapterProofs

    count = 0
    add = AdapterProofs.add

    def counted(self, *arguments) -> None:
        nonlocal count
        count += 1
        add(self, *arguments)

    monkeypatch.setattr(AdapterProofs, "add", counted)
    settings = make_settings(tmp_path / "data")
    with LiveServer(settings) as server:
        assert count == 2, "the folders, at their registration"
        assert push(server.client, "green", adapter_folders["green"]).status_code == 201
        assert count == 3
    with LiveServer(settings) as server:
        assert count == 3
        proof = server.client.get("/v1/adapters/red").json()["proof"]
        assert proof["dtype"] == "float32"
    with LiveServer(make_settings(tmp_path / "data", dtype="bfloat16")) as server:
        assert count == 3, "served in another type: what is there stays as it was accepted"
        assert push(server.client, "more", adapter_folders["green"]).json()["proof"]["dtype"] == "bfloat16"
        assert count == 4, "and what comes is proven as it will be served"


def test_proof_off(make_settings, adapter_folders, overflowing, tmp_path):
    with LiveServer(make_settings(tmp_path / "data", adapters=None, proof="off")) as server:
        accepted = push(server.client, "any", overflowing)
        assert accepted.status_code == 201
        assert accepted.json()["proof"] is None
        assert accepted.json()["report"]["matched"] == 6


class TestQuarantine:
    """Accepted without a proof, so that its NaN comes at run time."""

    @pytest.fixture
    def server(self, unproven: LiveServer):
        yield unproven
        unproven.check_at_rest()
        for row in unproven.client.get("/v1/adapters").json()["data"]:
            if row["name"] not in ("red", "blue"):
                assert unproven.client.delete(f"/v1/adapters/{row['name']}").status_code == 200

    def complete(self, server: LiveServer, model: str, **fields) -> httpx2.Response:
        body = {"model": model, "prompt": "the quick brown fox", "max_tokens": 8, **fields}
        return server.client.post("/v1/completions", json=body)

    def test_its_row_ends_with_an_error_and_it_answers_no_more(self, server, adapter_folders, overflowing):
        push(server.client, "bad", overflowing)
        error = self.complete(server, "bad")
        assert_error(error, 500, "non_finite_logits", "not a number", "bad@1 is in quarantine now", "push a corrected")
        for model in ("bad", "bad@1"):
            assert_error(
                self.complete(server, model), 422, "adapter_quarantined", "'bad@1' is in quarantine since", "Push"
            )
        detail = server.client.get("/v1/adapters/bad").json()
        assert detail["state"] == "quarantined"
        assert "NaN or infinite" in detail["quarantine"]["reason"]
        assert "bad" not in [card["id"] for card in server.client.get("/v1/models").json()["data"]]
        assert {row["state"] for row in server.client.get("/v1/adapters").json()["data"] if row["name"] == "bad"} == {
            "quarantined"
        }
        latest = server.client.get("/v1/adapters/bad/history").json()["data"][0]
        assert (latest["action"], latest["who"]) == ("quarantine", "server")

    def test_in_a_stream(self, server, overflowing):
        push(server.client, "bad", overflowing)
        body = {"model": "bad", "prompt": "the quick", "max_tokens": 8, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        [error] = [json.loads(event)["error"] for event in events if event != "[DONE]" and "error" in json.loads(event)]
        assert error["code"] == "non_finite_logits"
        assert "quarantine" in error["message"]
        assert_error(self.complete(server, "bad"), 422, "adapter_quarantined")

    def test_its_neighbours_do_not_notice(self, server, overflowing):
        """In the same steps, in the same blocks after it: the texts and logprobs are those of before."""
        push(server.client, "bad", overflowing)

        def answers() -> list[dict]:
            with ThreadPoolExecutor(6) as pool:
                fields = {"max_tokens": 40, "temperature": 0, "logprobs": 3}
                running = [pool.submit(self.complete, server, model, **fields) for model in ("base", "red", "blue")]
                ill = [pool.submit(self.complete, server, "bad") for _ in range(3)]
                assert {one.result().status_code for one in ill} <= {500, 422}
                return [one.result().json()["choices"][0] for one in running]

        alone = [
            self.complete(server, model, max_tokens=40, temperature=0, logprobs=3).json()["choices"][0]
            for model in ("base", "red", "blue")
        ]
        assert answers() == alone
        server.client.delete("/v1/adapters/bad")
        push(server.client, "bad", overflowing)
        assert answers() == alone

    def test_every_name_of_the_same_files(self, server, overflowing, adapter_folders):
        push(server.client, "one", overflowing)
        push(server.client, "two", overflowing)
        push(server.client, "two", adapter_folders["green"])
        assert self.complete(server, "one").status_code == 500
        assert_error(self.complete(server, "two@1"), 422, "adapter_quarantined")
        assert self.complete(server, "two").status_code == 200, "two means two@2, of other files"

    def test_delete_and_push_and_rollback_lift_it(self, server, overflowing, adapter_folders):
        push(server.client, "v", adapter_folders["green"])
        good = text_of(server.client, model="v", max_tokens=12)
        push(server.client, "v", overflowing)
        assert self.complete(server, "v").status_code == 500
        assert_error(self.complete(server, "v"), 422, "adapter_quarantined", "'v@2'", "roll 'v' back")
        assert text_of(server.client, model="v@1", max_tokens=12) == good
        assert server.client.post("/v1/adapters/v/rollback").json()["id"] == "v@1"
        assert text_of(server.client, model="v", max_tokens=12) == good
        again = server.client.post("/v1/adapters/v/rollback", json={"version": 2})
        assert_error(again, 422, "adapter_quarantined")
        assert server.client.delete("/v1/adapters/v@2").json()["current"] == "v@1"
        push(server.client, "v", overflowing)  # v@3
        assert self.complete(server, "v").status_code == 500
        pushed = push(server.client, "v", adapter_folders["grey"])
        assert pushed.json()["id"] == "v@4"
        assert self.complete(server, "v").status_code == 200
        assert_error(self.complete(server, "v@3"), 422, "adapter_quarantined")
        lifted = push(server.client, "v", overflowing)  # these files once more: proven anew, were the proof on
        assert (lifted.json()["id"], lifted.json()["state"]) == ("v@3", "ready")
        assert self.complete(server, "v").status_code == 500, "and it fails as before"

    def test_what_the_base_alone_cannot_compute_is_not_the_adapters_fault(self, server, adapter_folders, monkeypatch):
        """A prompt that breaks the base must not turn every adapter off."""
        push(server.client, "good", adapter_folders["green"])
        forward = server.engine.runner.forward

        def broken(*arguments, **keywords):
            logits, step = forward(*arguments, **keywords)
            return logits * float("nan"), step

        with monkeypatch.context() as patch:
            patch.setattr(server.engine.runner, "forward", broken)
            assert_error(
                self.complete(server, "good"), 500, "non_finite_logits", "base alone", "not put into quarantine"
            )
            assert_error(self.complete(server, "base"), 500, "non_finite_logits")
        assert self.complete(server, "good").status_code == 200

    def test_after_a_restart(self, make_settings, overflowing, adapter_folders, tmp_path):
        """It stays, also where the files lie in an operator's folder."""
        served = tmp_path / "served"
        shutil.copytree(overflowing, served / "bad")
        settings = make_settings(tmp_path / "data", adapters=served, proof="off")
        for expected in (500, 422, 422):
            with LiveServer(settings) as server:
                assert self.complete(server, "bad").status_code == expected
                assert server.client.get("/v1/adapters/bad").json()["versions"] == [1]
                server.check_at_rest()
