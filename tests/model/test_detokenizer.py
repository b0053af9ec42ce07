"""Detokenizer: the pieces are the text, never half a character, whatever the tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraplex.model.detokenizer import Detokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXTS = ["plain", "né café", "日本語", "😀👩‍👩‍👧", "e\u0301\u0323", "\u202bעברית", "a\n\tb", "�"]


def byte_level() -> Tokenizer:
    """One token a byte, and one special token."""
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: pieces of text with ▁ for spaces, and <0x..> for bytes beyond them."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "▁the": 258, "the": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, **options) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], **options)
    return [detokenizer.push(token) for token in ids]


def assert_whole_characters(pieces: list[str], text: str) -> None:
    """The pieces put together begin `text`; what is missing is an unfinished character at its end."""
    shown = "".join(pieces)
    assert text.startswith(shown)
    assert set(text[len(shown) :]) <= {"�"}


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens_come_whole(text):
    tokenizer = byte_level()
    pieces = pieces_of(tokenizer, tokenizer.encode(text).ids)
    if text == "�":  # the real character looks like an unfinished one: it waits for what follows
        pieces = pieces_of(tokenizer, tokenizer.encode(text + "a").ids)
        text = "�a"
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces if text != "�a")


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_byte_fallback_comes_whole(text):
    tokenizer = byte_fallback()
    ids = [byte + 1 for byte in text.encode()]
    pieces = pieces_of(tokenizer, ids, prompt=[258])
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_the_space_in_front_of_the_first_token_stays():
    assert pieces_of(byte_fallback(), [258, 259], prompt=[258]) == [" the", "the"]


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_comes_back(prompt, text):
    tokenizer = byte_level()
    prompt_ids, ids = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, ids, prompt_ids)
    assert_whole_characters(pieces, text)


@given(st.binary(max_size=12), st.binary(max_size=40))
def test_any_bytes_lose_nothing(prompt, data):
    """Also what is no text: half characters become U+FFFD once it is sure that they stay halves."""
    tokenizer = byte_level()
    token_of = byte_tokens(tokenizer)
    ids = [token_of[byte] for byte in data]
    detokenizer = Detokenizer(tokenizer, [token_of[byte] for byte in prompt])
    shown = ""
    for token in [*ids, token_of[ord("!")]]:  # a whole character at the end: nothing may be held back after it
        shown += detokenizer.push(token)
    # A prompt that ends inside a character may be completed by the first bytes.
    whole = (data + b"!").decode(errors="replace")
    completed = [(prompt[-n:] + data + b"!").decode(errors="replace") for n in range(1, 4)]
    assert shown == whole or any(text.endswith(shown) for text in completed)
    assert shown.endswith("!")


def byte_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token of each byte."""
    from loraplex.model.tokenizer import _byte_alphabet

    char_of = {byte: char for char, byte in _byte_alphabet().items()}
    return [tokenizer.token_to_id(char_of[byte]) for byte in range(256)]


def test_special_tokens_are_shown_on_request():
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<end>")
    ids = [*tokenizer.encode("a").ids, end, *tokenizer.encode("b").ids]
    assert "".join(pieces_of(tokenizer, ids)) == "ab"
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=False)) == "a<end>b"


def test_an_id_beyond_the_vocabulary_is_no_end():
    tokenizer = byte_level()
    a = tokenizer.encode("a").ids
    assert "".join(pieces_of(tokenizer, [*a, 100_000, *a])) == "aa"
