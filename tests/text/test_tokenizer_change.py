"""The tokenizer an adapter brings: the base's own, one with more tokens, or refused by name."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loraplex.errors import AdapterInvalid
from loraplex.lora.files import TEXT_FILES
from loraplex.model.tokenizer import Tokenizer
from loraplex.text.adapter_text import read_brought
from loraplex.text.tokenizer_change import TokenizerChange
from loraplex.text.tokenizer_identity import TokenizerIdentity

ROWS = 300
NEXT = 275  # the first id that the base has no token for
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def make_backend(more: str = "") -> RustTokenizer:
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox " + more] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return backend


def make_fast(**changes) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=make_backend(), **{**SPECIAL, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("base")
    make_fast().save_pretrained(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def identity(base: Tokenizer) -> TokenizerIdentity:
    return TokenizerIdentity(base)


@pytest.fixture
def read(base: Tokenizer, identity: TokenizerIdentity, tmp_path: Path):
    def read_change() -> TokenizerChange:
        return read_brought(tmp_path, base, identity, ROWS).change

    return read_change


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_the_bases_own_is_not_needed(base, read, tmp_path):
    make_fast().save_pretrained(tmp_path)
    assert {file.name for file in TEXT_FILES} >= {path.name for path in tmp_path.iterdir()}
    change = read()
    assert change.is_nothing
    assert set(change.unneeded) == {"tokenizer.json", "tokenizer_config.json"}
    assert change.apply(base) is base


def test_truncation_padding_and_spelling_make_no_difference(read, tmp_path):
    """As trainers and other releases of tokenizers write it."""
    make_fast().save_pretrained(tmp_path)

    def spell(document):
        document["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
        document["padding"] = {"strategy": "BatchLongest", "direction": "Left", "pad_id": 0, "pad_type_id": 0,
                               "pad_token": "<pad>", "pad_to_multiple_of": None}  # fmt: skip
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
        document["model"] = {key: value for key, value in document["model"].items() if value not in (None, False)}

    edit(tmp_path / "tokenizer.json", spell)
    assert read().is_nothing


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["model"]["vocab"].update(new=NEXT), "its vocabulary differs"),
        (lambda d: d["model"]["merges"].pop(), "its merges differ"),
        (lambda d: d["model"].update(byte_fallback=True), "its model's settings differ"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "its normalizer differs"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "its pre-tokenizer differs"),
        (lambda d: d.update(decoder={"type": "Fuse"}), "its decoder differs"),
        (lambda d: d.pop("model"), "cannot be read"),
        (lambda d: d.update(added_tokens=[7]), "cannot be read"),
        (lambda d: d["added_tokens"].append({"id": 290, "content": ""}), "added token"),
        (lambda d: d["added_tokens"].append({"id": -1, "content": "x"}), "added token"),
        (lambda d: d["added_tokens"].append({"id": NEXT, "content": "x" * 999}), "added token"),
        (lambda d: d["added_tokens"].append({"id": NEXT, "content": "x", "special": "no"}), "added token"),
        (lambda d: d["added_tokens"].append({"id": 5, "content": "<new>"}), "id 5 is '<new>', and .* in the base"),
        (lambda d: d["added_tokens"].append({"id": 290, "content": "the"}), "'the' has the id 290 here, and"),
        (lambda d: d["added_tokens"].append({"id": 290, "content": "<new>"}), "would have the id"),
    ],
)
def test_another_tokenizer_is_refused_by_name(base, read, tmp_path, change, match):
    make_fast().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer.json", change)
    with pytest.raises(AdapterInvalid, match=match) as error:
        read().apply(base)
    assert error.value.param == "tokenizer"
    assert len(error.value.message) < 700


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff" * 100, b"[" * 200_000, b'{"model": 1}'])
def test_what_is_no_tokenizer(read, tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(AdapterInvalid, match=r"tokenizer\.json cannot be read"):
        read()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
        (tmp_path / name).write_bytes(data if data != b'{"model": 1}' else b"1")
        with pytest.raises(AdapterInvalid, match=f"{name.removesuffix('.json')}.*cannot be"):
            read()
        (tmp_path / name).unlink()


def test_added_tokens(base, identity, read, tmp_path):
    own = make_fast()
    own.add_special_tokens({"additional_special_tokens": ["<|tool|>"], "eos_token": "<|im_end|>"})
    own.add_tokens([AddedToken("<note>", lstrip=True)])
    own.save_pretrained(tmp_path)
    change = read()
    assert [token.content for token in change.tokens if token.id in change.new_ids] == ["<|tool|>", "<note>"]
    tokenizer = change.apply(base)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the <note>fox", "a <|tool|> b<|im_end|>", "<s>the", " <note> <note>"):
        ids = tokenizer.encode(text)
        assert ids == loaded.encode(text)
        assert tokenizer.decode(ids) == loaded.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == loaded.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_id == loaded.eos_token_id != base.eos_token_id
    assert tokenizer.special_tokens == loaded.special_tokens_map
    assert base.encode("<note>", add_special_tokens=False) != tokenizer.encode("<note>", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("né<note>"))) == b"<s>n\xc3\xa9<note>"
    # What is kept says the same again when it is read from the store.
    for name in change.unneeded:
        (tmp_path / name).unlink()
    again = read()
    assert (again.tokens, again.special_tokens) == (change.tokens, change.special_tokens)


def test_other_flags_of_a_token_that_is_there(base, read, tmp_path):
    """And a new one beside it: both are as the adapter has them."""
    make_fast().save_pretrained(tmp_path)

    def mark(document):
        document["added_tokens"][3] |= {"rstrip": True, "special": False}
        document["added_tokens"].append({"id": NEXT, "content": "<new>", "lstrip": True, "special": True})

    edit(tmp_path / "tokenizer.json", mark)
    tokenizer = read().apply(base)
    assert tokenizer.encode("a<|im_end|>  b <new>", add_special_tokens=False)[1:] == [
        3, tokenizer.encode("b", add_special_tokens=False)[0], NEXT,
    ]  # fmt: skip
    assert tokenizer.decode([3], skip_special_tokens=True) == "<|im_end|>"
    assert base.decode([3], skip_special_tokens=True) == ""


def test_added_tokens_need_rows_that_exist_and_were_trained(base, read, tmp_path):
    own = make_fast()
    own.add_tokens([f"<n{i}>" for i in range(6)])
    own.save_pretrained(tmp_path)
    change = read()
    change.check_rows(range(1 << 20))
    with pytest.raises(AdapterInvalid, match=r"adds '<n0>', '<n1>', '<n2>' and 3 more, and .* trained no embedding"):
        change.check_rows(())
    with pytest.raises(AdapterInvalid, match=r"adds '<n4>', and .* for it"):
        change.check_rows(set(range(1 << 12)) - {change.tokens[4].id})
    own.add_tokens([f"<m{i}>" for i in range(ROWS)])
    own.save_pretrained(tmp_path)
    with pytest.raises(AdapterInvalid, match=rf"enlarges the vocabulary: .* embedding has {ROWS} rows \(0 to 299\)"):
        read()


def test_another_end_token_alone(base, read, tmp_path):
    """A chat adapter that ends its turns with a token that the base has: no new tokenizer is needed for that."""
    make_fast(eos_token="<|im_end|>").save_pretrained(tmp_path)
    change = read()
    assert (change.tokens, change.unneeded) == ((), ("tokenizer.json",))
    tokenizer = change.apply(base)
    assert tokenizer.eos_token_id == 3
    assert tokenizer.backend is base.backend
    assert tokenizer.special_tokens == {**SPECIAL, "eos_token": "<|im_end|>"}


def test_the_legacy_files(base, read, tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({**SPECIAL, "eos_token": {"content": "<|im_end|>", "lstrip": False}})
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<one>": NEXT, "<pad>": 0}))
    change = read()
    assert [(token.id, token.content, token.special) for token in change.tokens] == [(NEXT, "<one>", False)]
    assert change.special_tokens == {**SPECIAL, "eos_token": "<|im_end|>"}
    assert change.apply(base).encode("a<one>", add_special_tokens=False)[-1] == NEXT
    decoder = {str(NEXT): {"content": "<two>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**SPECIAL, "added_tokens_decoder": decoder}))
    change = read()  # with it the other two are not read
    assert [token.content for token in change.tokens] == ["<two>"]
    assert change.special_tokens is None
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**SPECIAL, "eos_token": "<nowhere>"}))
    with pytest.raises(AdapterInvalid, match="'<nowhere>', which has no id"):
        read()


def test_templates_and_notes(base, identity, tmp_path):
    def brought():
        return read_brought(tmp_path, base, identity, ROWS)

    config = {**SPECIAL, "chat_template": "one", "add_eos_token": True, "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = brought()
    assert (found.template, found.unneeded) == ("one", ())
    assert found.notes == ("tokenizer_config.json: not used here are 'add_eos_token'",)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**SPECIAL, "chat_template": named}))
    assert brought().template == "d"
    assert "not used are 'tool_use'" in brought().notes[0]
    (tmp_path / "chat_template.jinja").write_text("file")
    assert brought().template == "file"
    assert "chat_template.jinja is used" in brought().notes[-1]
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(AdapterInvalid, match="not UTF-8"):
        brought()
    (tmp_path / "chat_template.jinja").write_text("x" * ((256 << 10) + 1))
    with pytest.raises(AdapterInvalid, match="more than 262144 bytes"):
        brought()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(AdapterInvalid, match="chat_template is no text"):
        brought()


def test_another_post_processor_is_noted(base, identity, tmp_path):
    make_fast().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda d: d.update(post_processor=None))
    found = read_brought(tmp_path, base, identity, ROWS)
    assert found.change.is_nothing
    assert "follows the base's" in found.notes[0]
