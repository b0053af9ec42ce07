"""Chat as trained, over HTTP: an adapter's own template, tokenizer and profile beside the base's, in one server."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from folders import CONTEXT, TEMPLATE, make_tokenizer, parts_of, save_adapter
from live import LiveServer, assert_error
from openai import OpenAI
from test_api_chat import MESSAGES
from test_api_completions import stream, text_of
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from loraplex.config import Settings
from loraplex.errors import StartupError
from loraplex.lora.files import FILES
from tiny import make_model

ROWS = 344  # the embedding's; the tokenizer has fewer tokens
OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPINS = "{% if 'spin' in messages[-1].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ messages[-1].content }}"  # noqa: E501


def base_tokenizer() -> PreTrainedTokenizerFast:
    """It puts <|bos|> in front of what it encodes with special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def own_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose logits are wider than its tokenizer, with a generation config."""
    folder = tmp_path_factory.mktemp("text") / "base"
    tokenizer = base_tokenizer()
    assert len(tokenizer) < ROWS - 20
    make_model("llama", vocab_size=ROWS, max_position_embeddings=CONTEXT).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])
    GenerationConfig(eos_token_id=ends, temperature=0.01, do_sample=True, max_new_tokens=9).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(own_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(own_base, tmp_path_factory.mktemp("text") / "plain", seed=5, r=2)


@pytest.fixture(scope="module")
def embedding(own_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that trained every row of the embedding."""
    folder = tmp_path_factory.mktemp("text") / "embedding"
    return save_adapter(own_base, folder, seed=6, r=2, target_modules=["embed_tokens", "q_proj"])


@pytest.fixture(scope="module")
def own_server(
    own_base: Path, make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    settings = make_settings(tmp_path_factory.mktemp("data"), model=own_base, adapters=None)
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def client(own_server: LiveServer) -> Iterator[httpx2.Client]:
    yield own_server.client
    for name in own_server.service.catalog.names():
        assert own_server.client.delete(f"/v1/adapters/{name}").status_code == 200
    own_server.check_at_rest()


PART_OF = {file.name: file.part for file in FILES}


def push(client: httpx2.Client, name: str, folder: Path, **texts: str | bytes) -> httpx2.Response:
    """Push the two files of `folder`, its tokenizer files if it has them, and `texts` by the names of their parts."""
    parts = parts_of(folder)
    for file in FILES:
        if file.name.startswith(("tokenizer", "special")) and (folder / file.name).exists():
            parts[file.part] = (file.name, (folder / file.name).read_bytes())
    for part, text in texts.items():
        parts[part] = (part, text.encode() if isinstance(text, str) else text)
    return client.post("/v1/adapters", data={"name": name}, files=parts)


def pushed(client: httpx2.Client, name: str, folder: Path, **texts: str | bytes) -> dict:
    reply = push(client, name, folder, **texts)
    assert reply.status_code == 201, reply.text
    return reply.json()


def chat(client: httpx2.Client, **body) -> dict:
    reply = client.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def content_of(client: httpx2.Client, **body) -> str:
    return chat(client, temperature=0, max_tokens=8, ignore_eos=True, **body)["choices"][0]["message"]["content"]


def prompt_of(client: httpx2.Client, model: str, messages: list[dict] = MESSAGES) -> str:
    tokens = client.post("/tokenize", json={"model": model, "messages": messages}).json()["tokens"]
    return client.post("/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"]


def test_an_adapters_template_beside_the_bases(client, plain):
    reply = pushed(client, "own", plain, chat_template=OWN)
    assert reply["files"] == ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    assert pushed(client, "none", plain)["digest"] != reply["digest"]
    assert prompt_of(client, "own") == "<|bos|>[user]the quick brown<|eos|>[assistant]"
    assert prompt_of(client, "none") == prompt_of(client, "base") == "<|user|>the quick brown<|end|><|assistant|>"
    for model in ("own", "none", "base"):
        ids = client.post("/tokenize", json={"model": model, "messages": MESSAGES}).json()["tokens"]
        assert content_of(client, model=model) == text_of(client, model=model, prompt=ids, max_tokens=8)
    openai = OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    answer = openai.chat.completions.create(
        model="own", messages=[{"role": "user", "content": "the quick brown"}], max_tokens=8, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert (answer.model, answer.choices[0].message.content) == ("own@1", content_of(client, model="own"))
    unfinished = [*MESSAGES, {"role": "assistant", "content": "pack my"}]
    body = {"messages": unfinished, "continue_final_message": True, "add_generation_prompt": False}
    continued = text_of(
        client, model="own", prompt="[user]the quick brown<|eos|>[assistant]pack my", max_tokens=8
    )  # /v1/completions puts <|bos|> in front
    assert content_of(client, model="own", **body) == continued


def test_versions_keep_their_own(client, plain):
    pushed(client, "v", plain, chat_template="one {{ messages[0].content }}", profile='{"max_tokens": 3}')
    pushed(client, "v", plain, chat_template="two {{ messages[0].content }}", profile='{"max_tokens": 5}')
    pushed(client, "v", plain)
    assert [prompt_of(client, f"v@{n}")[:3] for n in (1, 2, 3)] == ["one", "two", "<|u"]
    assert prompt_of(client, "v") == prompt_of(client, "base")
    lengths = [chat(client, model=f"v@{n}", ignore_eos=True)["usage"]["completion_tokens"] for n in (1, 2, 3)]
    assert lengths == [3, 5, 9]
    assert client.get("/v1/models/v@1").json()["profile"] == {"max_tokens": 3}
    assert client.get("/v1/adapters/v@2").json()["profile"] == {"max_tokens": 5}
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert cards["v"]["profile"] is None
    # The same files again are the same version; one letter of the template makes another.
    again = push(client, "v", plain)
    assert (again.status_code, again.json()["id"]) == (200, "v@3")
    assert pushed(client, "v", plain, chat_template="Two {{ messages[0].content }}")["id"] == "v@4"


def test_a_profile(client, plain):
    profile = {"system_prompt": "Be brief.", "stop": ["e"], "temperature": 0, "max_tokens": 7}
    reply = pushed(client, "brief", plain, profile=json.dumps(profile))
    assert reply["profile"] == profile
    pushed(client, "plain", plain)
    assert prompt_of(client, "brief") == "<|system|>Be brief.<|end|><|user|>the quick brown<|end|><|assistant|>"
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Sing."}, *MESSAGES]
        assert prompt_of(client, "brief", own).startswith(f"<|{role}|>Sing.<|end|><|user|>")
    with_prompt = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    expected = chat(
        client, model="plain", messages=with_prompt, temperature=0, max_tokens=7, stop=["e"], ignore_eos=True
    )
    answer = chat(client, model="brief", ignore_eos=True)
    assert answer["choices"] == expected["choices"]
    # What the request says goes before it; an empty list of stops is said, too.
    longer = chat(client, model="brief", ignore_eos=True, max_tokens=30, stop=[])
    assert longer["usage"]["completion_tokens"] == 30
    # In completions all of it holds but the system prompt.
    body = {"model": "brief", "prompt": "the", "ignore_eos": True}
    completion = client.post("/v1/completions", json=body).json()
    said = {**body, "model": "plain", "temperature": 0, "max_tokens": 7, "stop": "e"}
    assert completion["choices"] == client.post("/v1/completions", json=said).json()["choices"]
    assert (
        completion["usage"]["prompt_tokens"]
        == client.post("/v1/completions", json=said).json()["usage"]["prompt_tokens"]
    )


@pytest.mark.parametrize(
    ("part", "text", "param", "match"),
    [
        ("chat_template", "{% for %}", "chat_template", "does not compile"),
        ("chat_template", "{% include 'x' %}", "chat_template", "names another template"),
        ("chat_template", "{{ ''.__class__.__mro__ }}", "chat_template", "reaches for what templates may not have"),
        ("chat_template", "{{ 'a' * 10**10 }}", "chat_template", "more memory than it may have"),
        ("chat_template", "{{ foo() }}", "chat_template", "fails on every sample conversation"),
        ("chat_template", "{{ 1 / 0 }}", "chat_template", "division by zero"),
        ("chat_template", "{% for i in range(10**9) %}x{% endfor %}", "chat_template", "Range too big"),
        ("chat_template", " \n", "chat_template", "it says nothing"),
        ("chat_template", "\udcff", "chat_template", "not UTF-8"),
        ("profile", '{"temprature": 1}', "profile", "'temprature' is no field"),
        ("profile", '{"top_p": 7}', "profile", "top_p must lie"),
        ("tokenizer", "{}", "tokenizer", "cannot be read"),
        ("tokenizer_config", "[]", "tokenizer_config", "not an object"),
        ("added_tokens", '{"<x>": 100000}', "tokenizer", "enlarges the vocabulary"),
        ("special_tokens_map", '{"eos_token": "<nowhere>"}', "tokenizer_config", "'<nowhere>', which has no id"),
    ],
)
def test_what_is_refused_at_upload_by_name(client, plain, part, text, param, match):
    reply = push(client, "bad", plain, **{part: text.encode("utf-8", "surrogateescape")})
    assert_error(reply, 422, "adapter_invalid", match, param=param)
    assert client.get("/v1/adapters").json()["total"] == 0


@pytest.mark.parametrize("part", ["chat_template", "profile", "tokenizer_config", "special_tokens_map", "added_tokens"])
def test_files_have_their_limits(client, plain, part):
    limit = next(file.max_bytes for file in FILES if file.part == part)
    reply = push(client, "big", plain, **{part: b" " * (limit + 1)})
    assert_error(reply, 413, "request_too_large", f"more than {limit} bytes", "it need not be there")


def test_a_template_that_is_slow_for_some_messages(client, plain):
    """Accepted, since the sample is none of them; then it runs into the limit, and nobody else notices."""
    pushed(client, "spins", plain, chat_template=SPINS)
    pushed(client, "quick", plain, chat_template=OWN)
    assert content_of(client, model="spins") is not None
    spin = {"model": "spins", "messages": [{"role": "user", "content": "spin"}], "max_tokens": 1}
    replies: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda: replies.append(client.post("/v1/chat/completions", json=spin)))
        for _ in range(4)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    served, slowest = 0, 0.0
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        for model in ("quick", "base"):
            chat(client, model=model, max_tokens=1)
        slowest = max(slowest, time.monotonic() - began)
        served += 1
    for thread in threads:
        thread.join()
    spun = time.monotonic() - started
    assert served > 10
    assert slowest < spun  # nobody waited for the template's end
    for reply in replies:
        assert_error(reply, 400, "chat_template_limit", "chat template cannot be run", param="messages")
    began = time.monotonic()
    assert_error(client.post("/v1/chat/completions", json=spin), 400, "chat_template_limit", "not tried again")
    assert time.monotonic() - began < spun / 2  # it did not run
    text_of(client, model="spins", max_tokens=1)  # it can still be used without


def test_a_template_that_wants_a_system_turn_is_noted(client, plain):
    source = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('Say who I am.') }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    reply = pushed(client, "picky", plain, chat_template=source)
    assert "Say who I am." in reply["notes"][0]
    refused = client.post("/v1/chat/completions", json={"model": "picky", "messages": MESSAGES})
    assert_error(refused, 400, "invalid_request", "refused the messages: Say who I am.", param="messages")
    pushed(client, "picky", plain, chat_template=source, profile='{"system_prompt": "A bot."}')
    assert prompt_of(client, "picky") == "<|system|>A bot.<|user|>the quick brown"


def test_the_bases_own_tokenizer_is_left_out(client, plain, own_base, tmp_path):
    """As trainers save it beside the adapter: nothing is kept of it, and the digest is that of the two files."""
    folder = tmp_path / "saved"
    shutil.copytree(plain, folder)
    base_tokenizer().save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    bare = pushed(client, "bare", plain)
    reply = pushed(client, "saved", folder)
    assert reply["digest"] == bare["digest"]
    assert reply["files"] == bare["files"]
    assert "tokenizer.json, tokenizer_config.json" in reply["notes"][-1]
    template = (folder / "chat_template.jinja").read_text()
    assert template == TEMPLATE
    pushed(client, "templated", folder, chat_template=template)
    assert content_of(client, model="templated") == content_of(client, model="bare")


def test_added_tokens_and_another_end(client, plain, embedding, own_base, tmp_path):
    tokenizer = base_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|done|>"})
    tokenizer.add_tokens(["<note>"])
    tokenizer.save_pretrained(tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(embedding / file, tmp_path)
    reply = pushed(client, "noted", tmp_path)
    assert reply["files"][2:] == ["tokenizer.json", "tokenizer_config.json"]
    for text in ("a <note> b", "<|done|>"):
        ids = client.post("/tokenize", json={"model": "noted", "prompt": text}).json()["tokens"]
        assert ids == tokenizer.encode(text)
    assert client.post("/tokenize", json={"prompt": "<note>"}).json()["tokens"] != tokenizer.encode("<note>")
    done = tokenizer.convert_tokens_to_ids("<|done|>")
    body = {"prompt": "the", "max_tokens": 4, "temperature": 0, "logit_bias": {str(done): 100}}
    ended = client.post("/v1/completions", json={**body, "model": "noted"}).json()
    assert ended["choices"][0] | {"logprobs": None} == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "stop_reason": None,
    }  # fmt: skip
    ignored = {**body, "model": "noted", "ignore_eos": True, "skip_special_tokens": False}
    assert client.post("/v1/completions", json=ignored).json()["choices"][0]["text"] == "<|done|>" * 4
    at_base = client.post("/v1/completions", json={**body, "model": "base"}).json()
    assert at_base["usage"]["completion_tokens"] == 4
    # Without trained rows, or beyond the embedding, it is refused.
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(plain / file, tmp_path)
    refused = push(client, "untrained", tmp_path)
    assert_error(refused, 422, "adapter_invalid", "'<|done|>', '<note>'", "trained no embedding", param="tokenizer")
    tokenizer.add_tokens([f"<{i}>" for i in range(ROWS)])
    tokenizer.save_pretrained(tmp_path)
    assert_error(push(client, "wide", tmp_path), 422, "adapter_invalid", "enlarges", str(ROWS), param="tokenizer")


def test_versions_differ_in_their_tokenizers(client, embedding, tmp_path):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(embedding / file, tmp_path)
    for token in ("<one>", "<two>"):
        tokenizer = base_tokenizer()
        tokenizer.add_tokens([token])
        tokenizer.save_pretrained(tmp_path)
        pushed(client, "t", tmp_path)
    last = len(base_tokenizer())
    for model, text in (("t@1", "<one>"), ("t@2", "<two>"), ("base", "")):
        assert client.post("/detokenize", json={"model": model, "tokens": [last]}).json() == {"prompt": text}


def test_ids_without_a_token(client, plain):
    """The logits are wider than the tokenizer: such an id has no text, and harms nothing."""
    bias = {str(ROWS - 1): 100}
    options = {"logit_bias": bias, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    pushed(client, "plain", plain)
    for model in ("base", "plain"):
        answer = chat(client, model=model, logprobs=True, top_logprobs=2, **options)
        assert answer["choices"][0]["message"]["content"] == ""
        assert answer["usage"]["completion_tokens"] == 4
        assert [entry["bytes"] for entry in answer["choices"][0]["logprobs"]["content"]] == [[]] * 4
        chunks = stream(client, model=model, logprobs=1, **options)
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == ""
    assert client.post("/detokenize", json={"tokens": [ROWS - 1]}).json() == {"prompt": ""}
    back = client.post("/v1/completions", json={"model": "base", "prompt": [5, ROWS - 1], "max_tokens": 1})
    assert back.status_code == 200
    beyond = client.post("/v1/completions", json={"model": "base", "prompt": [ROWS], "max_tokens": 1})
    assert_error(beyond, 400, "invalid_request", "outside the vocabulary", param="prompt")


def test_bos_comes_once(client, plain):
    pushed(client, "own", plain, chat_template=OWN)
    bos = base_tokenizer().bos_token_id

    def count(**body) -> tuple[int, int]:
        tokens = client.post("/tokenize", json=body).json()["tokens"]
        return tokens.count(bos), tokens[0] == bos

    assert count(prompt="the") == (1, True)
    assert count(prompt="the", add_special_tokens=False) == (0, False)
    assert count(messages=MESSAGES) == (0, False)  # the base's template writes none
    assert count(model="own", messages=MESSAGES) == (1, True)
    body = {"model": "base", "prompt": "the", "max_tokens": 1}
    lengths = [
        client.post("/v1/completions", json={**body, **more}).json()["usage"]["prompt_tokens"]
        for more in ({}, {"add_special_tokens": False})
    ]
    assert lengths[0] == lengths[1] + 1


def test_the_generation_config(client, own_base, plain, make_settings, tmp_path):
    """auto: its defaults hold where request and profile are silent; none: only its end tokens do."""
    ends = base_tokenizer().convert_tokens_to_ids(["<|eos|>", "<|end|>"])
    body = {"model": "base", "prompt": "the quick brown", "ignore_eos": True}

    def texts(client: httpx2.Client, **more) -> set[str]:
        replies = (client.post("/v1/completions", json={**body, "max_tokens": 12, **more}) for _ in range(4))
        return {reply.json()["choices"][0]["text"] for reply in replies}

    assert len(texts(client)) == 1  # temperature 0.01
    assert len(texts(client, temperature=1.0)) > 1  # the request says OpenAI's default
    assert len(texts(client, temperature=None)) == 1  # null says nothing
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["completion_tokens"] == 9
    pushed(client, "hot", plain, profile='{"temperature": 1.5, "max_tokens": 11}')
    assert len(texts(client, model="hot")) > 1
    assert client.post("/v1/completions", json={**body, "model": "hot"}).json()["usage"]["completion_tokens"] == 11
    with LiveServer(make_settings(tmp_path / "data", model=own_base, adapters=None, generation_config="none")) as other:
        assert len(texts(other.client)) > 1
        usage = other.client.post("/v1/completions", json=body).json()["usage"]
        assert usage["completion_tokens"] == 16
        for server in (other.client, client):
            for end in ends:
                asked = {**body, "ignore_eos": False, "logit_bias": {str(end): 100}, "temperature": 0}
                [choice] = server.post("/v1/completions", json=asked).json()["choices"]
                assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", None, "")


def test_a_default_of_max_tokens_gives_way_to_the_context(client, plain):
    pushed(client, "long", plain, profile='{"max_tokens": 1000}')
    usage = chat(client, model="long", ignore_eos=True)["usage"]
    assert usage["total_tokens"] == CONTEXT


def test_no_template_anywhere(own_base, plain, make_settings, tmp_path):
    bare = tmp_path / "base"
    shutil.copytree(own_base, bare)
    (bare / "chat_template.jinja").unlink()
    with LiveServer(make_settings(tmp_path / "data", model=bare, adapters=None)) as server:
        client = server.client
        pushed(client, "none", plain)
        pushed(client, "own", plain, chat_template=OWN)
        for model in ("base", "none"):
            reply = client.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES})
            assert_error(
                reply, 400, "no_chat_template", "chat_template.jinja", "--chat-template FILE", param="messages"
            )
        assert content_of(client, model="own") is not None
    given = tmp_path / "given.jinja"
    given.write_text("given {{ messages[0].content }}")
    with LiveServer(make_settings(tmp_path / "data", model=bare, adapters=None, chat_template=given)) as server:
        assert prompt_of(server.client, "none") == prompt_of(server.client, "base") == "given the quick brown"
        assert prompt_of(server.client, "own").startswith("<|bos|>[user]")  # and it is still there after a restart


def test_an_operators_folder_and_a_restart(own_base, embedding, make_settings, tmp_path):
    served = tmp_path / "served"
    folder = served / "mine"
    shutil.copytree(embedding, folder)
    tokenizer = base_tokenizer()
    tokenizer.add_tokens(["<note>"])
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(OWN)
    (folder / "serving_profile.json").write_text('{"max_tokens": 4}')
    (folder / "optimizer.pt").write_bytes(b"\x80")
    (folder / "checkpoint-10").mkdir()
    settings = make_settings(tmp_path / "data", model=own_base, adapters=served)
    for _ in range(2):
        with LiveServer(settings) as server:
            card = server.client.get("/v1/adapters/mine").json()
            assert card["versions"] == [1]
            assert card["files"][2:] == ["chat_template.jinja", "tokenizer.json", "serving_profile.json"]
            assert chat(server.client, model="mine", ignore_eos=True)["usage"]["completion_tokens"] == 4
            assert prompt_of(server.client, "mine", [{"role": "user", "content": "<note>"}])[7:19] == "[user]<note>"
            server.check_at_rest()
    (folder / "serving_profile.json").write_text('{"max_tokens": 5}')
    with LiveServer(settings) as server:
        assert server.client.get("/v1/adapters/mine").json()["versions"] == [2, 1]
        blob = server.service.catalog.store.path(server.service.resolve("mine").adapter.digest)  # type: ignore
        (blob / "chat_template.jinja").write_text("changed behind our back")
        reply = server.client.post("/v1/chat/completions", json={"model": "mine", "messages": MESSAGES})
        assert_error(reply, 500, "adapter_load_failed", "chat_template.jinja no longer has the recorded SHA-256")
        assert chat(server.client, model="mine@1", ignore_eos=True)["usage"]["completion_tokens"] == 4
    (folder / "chat_template.jinja").write_text("{% broken")
    with pytest.raises(StartupError, match=r"'mine' in .*chat_template\.jinja does not compile"):
        LiveServer(settings).__enter__()
