"""Tokenizer: loading, chats, refusals, and the bytes of a token."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplex.errors import InvalidRequest, StartupError
from loraplex.model.tokenizer import Tokenizer, require_unicode

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
USER = [{"role": "user", "content": "hi"}]


def make_fast() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = RustTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def make(template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(make_fast(), template)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make()


def test_a_saved_one_loads_with_another_template(tmp_path: Path):
    saved = make_fast()
    saved.chat_template = TEMPLATE
    saved.save_pretrained(tmp_path)
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}?")
    own = Tokenizer.load(tmp_path, tmp_path / "own.jinja")
    assert own.decode(own.encode_chat(USER)) == "hi?"
    assert Tokenizer.load(tmp_path).chat_template == TEMPLATE
    assert own.eos_token_id == own.vocab_size - 1
    assert own.special_tokens == {"eos_token": "<end>"}
    with pytest.raises(StartupError, match=r"absent\.jinja cannot be read"):
        Tokenizer.load(tmp_path, tmp_path / "absent.jinja")


def test_a_folder_without_one(tmp_path: Path):
    with pytest.raises(StartupError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_chats(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode_chat(USER)) == "<user>hi!"
    assert tokenizer.decode(tokenizer.encode_chat(USER, add_generation_prompt=False)) == "<user>hi"
    unfinished = [*USER, {"role": "assistant", "content": "we"}]
    ids = tokenizer.encode_chat(unfinished, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(ids) == "<user>hi<assistant>we"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not so') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
        "{% if %}",
        "{{ messages[0].content | nofilter }}",
    ],
)
def test_a_template_that_fails_is_the_requests_fault(template):
    with pytest.raises(InvalidRequest, match="chat template refused"):
        make(template).encode_chat(USER)


def test_no_template():
    with pytest.raises(InvalidRequest, match="no chat template") as error:
        make(None).encode_chat(USER)
    assert error.value.code == "no_chat_template"


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate pair at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\udc00"}])
    require_unicode("né 😀")


@given(text=st.text(max_size=20))
def test_the_bytes_of_the_tokens_are_the_text(text):
    tokenizer = _shared()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@cache
def _shared() -> Tokenizer:

    return make()


def test_the_bytes_of_other_tokens(tokenizer: Tokenizer):
    assert tokenizer.eos_token_id is not None
    assert tokenizer.token_bytes(tokenizer.eos_token_id) == b"<end>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_name(10**6) is None
    vocab = {"<unk>": 0, "<0xE2>": 1, "▁the": 2}
    backend = RustTokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    other = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [other.token_bytes(token) for token in (1, 2)] == [b"\xe2", b" the"]


def test_it_may_be_used_from_many_threads(tokenizer: Tokenizer):
    texts = [f"text {i} né" * 20 for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(lambda t: tokenizer.encode_chat([{"role": "user", "content": t}]), texts))
    assert [tokenizer.decode(ids) for ids in encoded] == [f"<user>{text}!" for text in texts]
