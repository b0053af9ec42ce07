"""Bad input: the right status, a message that helps, and a server that is none the worse for it (`server` checks)."""

import json
import socket

import httpx2
import pytest
from folders import Files
from live import LiveServer, assert_error


def post(client: httpx2.Client, **body) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 1, **body})


def raw(client: httpx2.Client, content: bytes | str, path: str = "/v1/completions", **headers) -> httpx2.Response:
    headers = {"content-type": "application/json", **headers}
    return client.post(path, content=content, headers=headers)


# -- requests -------------------------------------------------------------------------------------------------


def test_an_unknown_adapter_gets_the_nearest_names(client):
    error = assert_error(post(client, model="blu"), 404, "model_not_found", "'blu'", "Did you mean 'blue'")
    assert error["param"] == "model"
    with client.stream("POST", "/v1/completions", json={"model": "blu", "prompt": "a", "stream": True}) as reply:
        reply.read()
        assert_error(reply, 404, "model_not_found")  # refused before a stream begins
    assert_error(post(client, model="red@9"), 404, "model_not_found", "no version 9", "versions are 1")
    assert_error(post(client, model="base@1"), 404, "model_not_found", "no versions")


@pytest.mark.parametrize("number", [True, "1", 1.0, 0])
def test_numbers_of_versions_and_revisions_are_integers(client, number):
    for path, field in (("/v1/adapters/red/rollback", "version"), ("/v1/routes/none/rollback", "revision")):
        assert_error(client.post(path, json={field: number}), 400, "invalid_request", field, param=field)


def test_a_body_that_is_no_object_is_called_the_body(client):
    error = assert_error(raw(client, "[1]", "/v1/adapters/red/rollback"), 400, "invalid_request")
    assert error["message"].startswith("the body: ")


@pytest.mark.parametrize("model", ["../etc/passwd", "", "a b", "x" * 65, "ünï", "red@0", "red@x", "red@1@2"])
def test_bad_names(client, model):
    assert_error(post(client, model=model), 400, "invalid_name", param=None)


def test_a_prompt_beyond_the_context(client):
    phrase = "This model's maximum context length is 256 tokens"
    error = assert_error(post(client, prompt=[9] * 250, max_tokens=7), 400, "context_length_exceeded", phrase)
    assert "250" in error["message"]
    assert post(client, prompt=[9] * 250, max_tokens=6).status_code == 200
    messages = [{"role": "user", "content": "far too long " * 200}]
    reply = client.post("/v1/chat/completions", json={"model": "base", "messages": messages})
    assert_error(reply, 400, "context_length_exceeded", phrase)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": "many"}, "n"),
        ({"prompt": ["a"] * 256, "n": 16}, "n"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": -5}, "min_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [10**6], "min_tokens": 1}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"logit_bias": {"9": 101}}, "logit_bias"),
        ({"logit_bias": {"9": "much"}}, "logit_bias"),
        ({"logit_bias": {"9": None}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"model": None}, "model"),
        ({"model": "x" * 257}, "model"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_out_of_bounds(client, body, param):
    error = assert_error(post(client, **body), 400, "invalid_request", param=param)
    assert any(word in error["message"] for word in (param, "prompt", "token id"))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty", "seed"])
def test_numbers_that_are_none(client, field, number):
    reply = raw(client, f'{{"model": "base", "prompt": "a", "{field}": {number}}}')
    assert_error(reply, 400, "invalid_request", field, param=field)
    reply = raw(client, f'{{"model": "base", "prompt": "a", "logit_bias": {{"9": {number}}}}}')
    assert_error(reply, 400, "invalid_request", "logit_bias", param="logit_bias")


@pytest.mark.parametrize(
    "body",
    [
        '{"model": "base", "prompt": "\\ud800"}',
        '{"model": "base", "prompt": ["a", "\\udfff"]}',
        '{"model": "base", "prompt": "a", "stop": "\\ud800"}',
        '{"model": "base", "prompt": "a", "stop": ["b", "\\ud800"]}',
    ],
)
def test_half_a_surrogate_pair(client, body):
    assert_error(raw(client, body), 400, "invalid_request", "surrogate")


def test_half_a_surrogate_pair_elsewhere(client):
    for body in ('{"model": "\\ud800", "prompt": "a"}', '{"model": "base", "prompt": "a", "cache_salt": "\\ud800"}'):
        assert_error(raw(client, body), 400, "invalid_request", "unicode")
    assert_error(raw(client, '{"model": "base", "prompt": "a", "best_of": "\\ud800"}'), 400, "unsupported_parameter")
    assert raw(client, '{"model": "base", "prompt": "a", "\\ud800": 1}').status_code == 400
    body = '{"model": "base", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    assert_error(raw(client, body, "/v1/chat/completions"), 400, "invalid_request", "surrogate")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[1, 2",
        "not json",
        '{"model": "base",}',
        b"\xff\xfe",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"n": ' + "9" * 10_000 + "}",
    ],
    ids=lambda body: str(body[:12]),
)
def test_malformed_json(client, body):
    reply = raw(client, body)
    assert reply.status_code == 400, reply.text
    assert_error(reply, 400, reply.json()["error"]["code"])


@pytest.mark.parametrize("body", ["null", "[]", '"text"', "7", "true"])
def test_json_that_is_no_object(client, body):
    assert_error(raw(client, body), 400, "invalid_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_json_sent_as_something_else(client, path, kind):
    body = json.dumps({"model": "base", "prompt": "a", "messages": []})
    reply = raw(client, body, path, **{"content-type": kind})
    assert_error(reply, 415, "unsupported_media_type", "Content-Type: application/json")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [None] * 300_000},
        {"prompt": [[None] * 300] * 1000},
        {"prompt": [{}] * 300_000},
        {"stop": [1] * 300_000},
        {"logit_bias": {str(i): "x" for i in range(100_000)}},
        {"messages": [None] * 300_000},
        {"messages": [{"role": "user", "content": [1] * 300_000}]},
        {"stop_token_ids": ["x"] * 300_000},
        {"n": "x" * 1_000_000},
    ],
    ids=lambda body: next(iter(body)),
)
def test_a_body_of_faults_gets_a_short_answer(client, body):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    reply = client.post(path, json={"model": "base", "prompt": "a", **body})
    assert reply.status_code == 400
    assert len(reply.content) < 4096
    assert reply.elapsed.total_seconds() < 2


def test_bodies_beyond_the_limit(client):
    big = json.dumps({"model": "base", "prompt": "a" * (9 << 20)}).encode()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        assert_error(raw(client, big, path), 413, "request_too_large", "larger")
    pieces = (big[i : i + 65536] for i in range(0, len(big), 65536))
    reply = client.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})
    assert_error(reply, 413, "request_too_large", "larger")


def test_unknown_places(client):
    assert_error(client.get("/v1/nothing"), 404, "not_found", "/v1/nothing")
    assert_error(client.post("/v1/nothing%ff\ud83d".encode("utf-8", "ignore").decode(), json={}), 404, "not_found")
    assert_error(client.get("/" + "x" * 1000), 404, "not_found")
    reply = client.delete("/v1/completions")
    assert_error(reply, 405, "method_not_allowed", "DELETE")
    assert reply.headers["allow"] == "POST"
    assert client.head("/v1/nothing").status_code == 404


def test_unexpected_errors_are_objects_too(server: LiveServer, client, monkeypatch):
    monkeypatch.setattr(server.service, "_check_open", lambda: 1 / 0)
    assert_error(post(client), 500, "internal_error", "ZeroDivisionError", "log")


# -- uploads --------------------------------------------------------------------------------------------------


def upload(client: httpx2.Client, files: Files, tmp_path, name: str = "bad") -> httpx2.Response:
    return client.post("/v1/adapters", data={"name": name}, files=files.parts(tmp_path))


@pytest.fixture(autouse=True)
def nothing_was_accepted(server: LiveServer):
    yield
    assert set(server.service.catalog.names()) == {"red", "blue"}
    live = server.service.catalog.registry.live_digests()
    server.service.catalog.sweep()
    assert server.service.catalog.store.digests() == live


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pth", "x.ckpt", "x.pkl"])
def test_pickle_by_name(client, green, tmp_path, name):
    green.weights_name = name
    assert_error(upload(client, green, tmp_path), 415, "pickle_refused", "safetensors", param="weights")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q", b"\x80\x04\x95"])
def test_pickle_by_magic_bytes(client, green, tmp_path, start):
    green.weights = start + b"\0" * 1000
    assert_error(upload(client, green, tmp_path), 415, "pickle_refused", "safetensors")


def spoil_shape(files: Files) -> None:
    files.tensors[A] = files.tensors[A][:, :-1]


def spoil_name(files: Files) -> None:
    for key in (A, B):
        files.tensors[key.replace("q_proj", "z_proj")] = files.tensors.pop(key)


def add_tensor(files: Files) -> None:
    files.tensors["base_model.model.surprise"] = files.tensors[A].clone()


def set_nan(files: Files) -> None:
    files.tensors[B][0, 0] = float("nan")


def set_infinity(files: Files) -> None:
    files.tensors[A][1, 2] = float("-inf")


def zero(files: Files) -> None:
    for name, tensor in files.tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def raise_rank(files: Files) -> None:
    for name, tensor in files.tensors.items():
        files.tensors[name] = tensor.repeat(16, 1) if "lora_A" in name else tensor.repeat(1, 16)
    files.config["r"] = 32


@pytest.mark.parametrize(
    ("spoil", "texts"),
    [
        (spoil_shape, (A, "63", "64")),
        (spoil_name, ("z_proj", "base_model.model.model")),
        (add_tensor, ("surprise",)),
        (set_nan, (B, "NaN")),
        (set_infinity, (A, "infinity")),
        (zero, ("effect", "lora_B")),
        (raise_rank, ("32", "16", "--max-lora-rank")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_that_do_not_fit(client, green, tmp_path, spoil, texts):
    spoil(green)
    assert_error(upload(client, green, tmp_path), 422, "adapter_invalid", *texts)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_mapping": {"base_model_class": "X", "parent_library": "evil.module"}},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"peft_type": "IA3"},
        {"layer_replication": [[0, 1]]},
        {"r": "four"},
        {"r": -1},
        {"lora_alpha": 1e400},
        {"surprise": 1},
    ],
    ids=lambda config: next(iter(config)),
)
def test_configs_that_ask_for_more(client, green, tmp_path, config):
    green.config |= config
    # An infinity is no JSON, so the message cannot name its field.
    text = "JSON" if "lora_alpha" in config else next(iter(config))
    assert_error(upload(client, green, tmp_path), 422, "adapter_invalid", text)


@pytest.mark.parametrize("weights", [b"", b"{}", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      ", b"GGUF" + b"\0" * 100])
def test_weights_that_are_none(client, green, tmp_path, weights):
    green.weights = weights
    assert_error(upload(client, green, tmp_path), 422, "adapter_invalid", param="weights")


def test_a_config_that_is_none(client, green, tmp_path):
    parts = green.parts(tmp_path)
    for config in (b"", b"[", b"[]", b"\xff", b"[" * 10_000):
        reply = client.post(
            "/v1/adapters", data={"name": "bad"}, files={**parts, "config": ("adapter_config.json", config)}
        )
        assert_error(reply, 422, "adapter_invalid", param="config")


@pytest.mark.parametrize("name", ["", "a b", "../../x", "x@1", "a+b", "x" * 65, "x" * 1000, "é", "a\nb"])
def test_upload_names(client, green, tmp_path, name):
    reply = upload(client, green, tmp_path, name)
    assert reply.status_code == 400
    assert_error(reply, 400, reply.json()["error"]["code"], param="name")


def test_the_weights_are_too_large(client, green, tmp_path):
    green.weights = b"\0" * ((4 << 20) + 1)
    assert_error(upload(client, green, tmp_path), 413, "request_too_large", "limit")
    green.weights = b"\0" * (80 << 20)  # beyond what the route takes at all
    assert_error(upload(client, green, tmp_path), 413, "request_too_large", "larger")
    request = client.build_request("POST", "/v1/adapters", data={"name": "bad"}, files=green.parts(tmp_path))
    body = request.read()
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    reply = client.post("/v1/adapters", content=pieces, headers={"content-type": request.headers["content-type"]})
    assert_error(reply, 413, "request_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "multipart/mixed; boundary=x"])
def test_an_upload_of_another_type(client, kind):
    reply = client.post("/v1/adapters", content=b"{}", headers={"content-type": kind})
    assert_error(reply, 415, "unsupported_media_type", "curl -F")


def test_an_upload_lacks_or_repeats_a_part(client, green, tmp_path):
    parts = green.parts(tmp_path)
    for missing in ("config", "weights"):
        rest = {part: parts[part] for part in parts if part != missing}
        reply = client.post("/v1/adapters", data={"name": "bad"}, files=rest)
        assert_error(reply, 400, "invalid_request", missing, param=missing)
    assert_error(client.post("/v1/adapters", files=parts), 400, "invalid_request", "name", param="name")
    for extra, text in (("config", "twice"), ("surprise", "unknown part")):
        reply = client.post("/v1/adapters", data={"name": "bad"}, files=[*parts.items(), (extra, ("x", b"{}"))])
        assert_error(reply, 400, "invalid_request", text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b"no boundary at all",
        b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nbad',
        b'--x\r\nContent-Disposition: form-data; name="weights"\r\n\r\nhalf',
        b"--x\r\nContent-Disposition: form-data; name=" + b"y" * 100_000 + b"\r\n\r\n",
        b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"--x\r\n\r\n\r\n--x--\r\n",
    ],
    ids=range(8),
)
def test_malformed_multipart(client, body):
    reply = client.post("/v1/adapters", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert_error(reply, 400, "invalid_request")


def test_an_upload_that_breaks_off(server: LiveServer):
    head = (
        b"POST /v1/adapters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b'Content-Length: 100000\r\n\r\n--x\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"z" * 1000)
        server.wait_until(lambda: bool(server.staging), "the staging")
    server.wait_until(lambda: not server.staging, "the clean-up")


def test_a_full_disk(server: LiveServer, client, green, tmp_path, monkeypatch):
    monkeypatch.setattr(server.service.catalog.store, "_min_free_bytes", 1 << 60)
    assert_error(upload(client, green, tmp_path), 507, "insufficient_storage", "disk")
