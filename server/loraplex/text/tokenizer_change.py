"""TokenizerChange: how the tokenizer an adapter brings differs from the base's.

It may add tokens, give existing ones other flags, and name other special tokens (a chat adapter often ends its answers
with another one). Everything else about it is the base's, or the adapter is refused.
"""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraplex.errors import AdapterInvalid
from loraplex.lora.files import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
    AdapterFile,
)
from loraplex.lora.text import listed, shown
from loraplex.model.tokenizer import NewToken, Tokenizer
from loraplex.text.tokenizer_identity import TokenizerIdentity, new_token

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Fields of tokenizer_config.json that are read here.
_READ = {*NAMED, "added_tokens_decoder", "chat_template", "extra_special_tokens", "additional_special_tokens"}
# Fields that say nothing a server could do otherwise.
_IDLE = {
    *("tokenizer_class", "backend", "is_local", "local_files_only", "name_or_path", "processor_class", "legacy"),
    *("from_slow", "model_max_length", "padding_side", "truncation_side", "model_input_names"),
}


@dataclass(frozen=True, slots=True)
class TokenizerChange:
    """`tokens`: those that are new (`new_ids`) or have other flags than the base's. `special_tokens`: the named ones,
    all of them; None: the base's. `template`: that of tokenizer_config.json."""

    tokens: tuple[NewToken, ...] = ()
    new_ids: frozenset[int] = frozenset()
    special_tokens: Mapping[str, str] | None = field(default=None, hash=False)
    template: str | None = None
    unneeded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_nothing(self) -> bool:
        return not self.tokens and self.special_tokens is None

    def apply(self, base: Tokenizer) -> Tokenizer:
        """The adapter's tokenizer; the base's own object where nothing differs. Raises AdapterInvalid."""
        if self.is_nothing:
            return base
        special = base.special_tokens if self.special_tokens is None else self.special_tokens
        try:
            return base.changed(self.tokens, special)
        except Exception as error:
            raise _invalid(
                TOKENIZER, f"its added tokens cannot be put into the base's tokenizer: {str(error)[:200]}"
            ) from error

    def check_rows(self, trained: Container[int]) -> None:
        """Refuse new tokens that are not among those whose rows the adapter has trained: they would mean nothing to the
        model."""
        untrained = [token.content for token in self.tokens if token.id in self.new_ids and token.id not in trained]
        if untrained:
            raise AdapterInvalid(
                f"The adapter's tokenizer adds {listed(untrained)}, and the adapter has trained no embedding for "
                f"{'them' if len(untrained) > 1 else 'it'}: to the base these ids are noise. Train the rows "
                "(trainable_token_indices, or LoRA on the embedding), or send the upload without the tokenizer files.",
                param="tokenizer",
            )


def read_change(folder: Path, base: Tokenizer, identity: TokenizerIdentity, num_rows: int) -> TokenizerChange:
    """The tokenizer files of `folder` against `base`, whose embedding has `num_rows`. Raises AdapterInvalid.

    As in transformers, tokenizer_config.json's added_tokens_decoder stands for special_tokens_map.json and
    added_tokens.json, which are read only without it.
    """
    notes: list[str] = []
    tokens = _Tokens(base, identity)
    if (folder / TOKENIZER.name).exists():
        found = identity.read(folder / TOKENIZER.name)
        for token in found.tokens:
            tokens.add(TOKENIZER, token)
        if identity.has_own_post_processor(found):
            notes.append(
                "tokenizer.json puts other special tokens around a prompt than the base's tokenizer; /v1/completions "
                "follows the base's (chats follow the template alone)"
            )
    config = _read(folder, TOKENIZER_CONFIG)
    named_map = _read(folder, SPECIAL_TOKENS_MAP)
    by_id = config.get("added_tokens_decoder")
    for token_id, document in _object(TOKENIZER_CONFIG, "added_tokens_decoder", by_id).items():
        tokens.add(TOKENIZER_CONFIG, new_token(document, _whole(token_id)))
    special = _named(TOKENIZER_CONFIG, config)
    extra = _texts(config.get("extra_special_tokens")) + _texts(config.get("additional_special_tokens"))
    if not by_id:
        special |= _named(SPECIAL_TOKENS_MAP, named_map)
        extra += _texts(named_map.get("additional_special_tokens"))
        for content, token_id in _read(folder, ADDED_TOKENS).items():
            tokens.add_plain(content, token_id, is_special=content in (*special.values(), *extra))
    changes_special = bool(special) and special != {n: t for n, t in base.special_tokens.items() if n in NAMED}
    others = {name: token for name, token in base.special_tokens.items() if name not in NAMED}
    for content in dict.fromkeys((*special.values(), *extra)):
        tokens.mark_special(content)
    tokens.check(num_rows)
    template = _template_of(config, notes)
    notes += _unused(config, base)
    return TokenizerChange(
        tokens=tokens.changes,
        new_ids=frozenset(tokens.new),
        special_tokens={**others, **special} if changes_special else None,
        template=template,
        unneeded=_unneeded(folder, tokens.sources, template is not None or changes_special),
        notes=tuple(notes),
    )


class _Tokens:
    """The tokens of all files, compared with the base's one by one."""

    def __init__(self, base: Tokenizer, identity: TokenizerIdentity):
        self._backend = base.backend
        self._identity = identity
        self._found: dict[int, NewToken] = {}
        self._id_of: dict[str, int] = {}
        self._files: dict[int, set[str]] = {}
        self.new: set[int] = set()

    @property
    def changes(self) -> tuple[NewToken, ...]:
        """In the order of their ids."""
        found = (self._found[token_id] for token_id in sorted(self._found))
        return tuple(token for token in found if token.id in self.new or not self._identity.has_token(token))

    @property
    def sources(self) -> set[str]:
        """The files that tell of a change."""
        return {name for token in self.changes for name in self._files[token.id]}

    def add(self, file: AdapterFile, token: NewToken) -> None:
        """The first file that tells of a token decides about its flags."""
        known = self._found.get(token.id)
        if known is not None and known.content != token.content:
            raise _invalid(file, f"the token id {token.id} is {shown(known.content)} and {shown(token.content)}")
        other = self._id_of.get(token.content, self._backend.token_to_id(token.content))
        if other is not None and other != token.id:
            raise _invalid(file, f"the token {shown(token.content)} has the id {token.id} here, and {other} elsewhere")
        text = self._backend.id_to_token(token.id)
        if text is not None and text != token.content:
            raise _invalid(file, f"the token id {token.id} is {shown(token.content)}, and {shown(text)} in the base")
        if text is None:
            self.new.add(token.id)
        self._found.setdefault(token.id, token)
        self._id_of[token.content] = token.id
        self._files.setdefault(token.id, set()).add(file.name)

    def add_plain(self, content: str, token_id: Any, *, is_special: bool) -> None:
        """A line of added_tokens.json, which tells no flags."""
        if self._backend.token_to_id(content) != token_id:
            flags = {"content": content, "normalized": not is_special, "special": is_special}
            self.add(ADDED_TOKENS, new_token(flags, token_id))

    def mark_special(self, content: str) -> None:
        """A token that is named as special is one, as in transformers."""
        token_id = self._id_of.get(content, self._backend.token_to_id(content))
        if token_id is None:
            raise _invalid(
                TOKENIZER_CONFIG, f"it names the special token {shown(content)}, which has no id in any of the files"
            )
        own = self._backend.get_added_tokens_decoder().get(token_id)
        token = self._found.get(token_id)
        if token is None and own is not None:
            flags = (own.single_word, own.lstrip, own.rstrip, own.normalized, own.special)
            token = NewToken(token_id, content, *flags)
        if token is None or not token.special:
            self._found[token_id] = replace(token or NewToken(token_id, content), normalized=False, special=True)
            self._id_of[content] = token_id
            self._files.setdefault(token_id, set()).add(TOKENIZER_CONFIG.name)

    def check(self, num_rows: int) -> None:
        beyond = sorted(token_id for token_id in self.new if token_id >= num_rows)
        if beyond:
            names = listed([self._found[token_id].content for token_id in beyond])
            raise AdapterInvalid(
                f"The adapter enlarges the vocabulary: its tokenizer adds {names} up to the id {beyond[-1]}, and the "
                f"base's embedding has {num_rows} rows (0 to {num_rows - 1}). Train with tokens that the base has rows "
                "for, or serve a base whose embedding was resized before the training.",
                param="tokenizer",
            )


def _read(folder: Path, file: AdapterFile) -> dict[str, Any]:
    """A small JSON object; {} if the file is not there."""
    path = folder / file.name
    if not path.exists():
        return {}
    try:
        with open(path, "rb") as stream:
            data = stream.read((file.max_bytes or 0) + 1)
        if len(data) > (file.max_bytes or 0):
            raise ValueError(f"it has more than {file.max_bytes} bytes")
        document = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(file, f"it cannot be read: {shown(str(error), 160)}") from error
    return _object(file, "", document)


def _object(file: AdapterFile, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(file, f"{name or 'it'} is not an object")
    return value


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 12 else -1


def _named(file: AdapterFile, document: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in NAMED:
        value = document.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None:
            continue
        if not isinstance(content, str) or not content:
            raise _invalid(file, f"{name} is {shown(value)}")
        named[name] = content
    return named


def _texts(value: Any) -> list[str]:
    """Contents of a list of special tokens, or of a table of them by name."""
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    contents = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return [content for content in contents if isinstance(content, str) and content]


def _template_of(config: Mapping[str, Any], notes: list[str]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        others = sorted(str(name) for name in template if name != "default")
        if others:
            notes.append(f"tokenizer_config.json has several chat templates; not used are {listed(others)}")
        template = template.get("default")
    if template is None:
        return None
    limit = CHAT_TEMPLATE.max_bytes or 0
    if not isinstance(template, str) or len(template) > limit:
        raise _invalid(TOKENIZER_CONFIG, f"its chat_template is no text of at most {limit} characters")
    return template


def _unused(config: Mapping[str, Any], base: Tokenizer) -> list[str]:
    """A note on the fields that say something else than the base's and are not used."""
    own = {} if base.folder is None else _read(base.folder, TOKENIZER_CONFIG)
    names = [
        name
        for name, value in config.items()
        if name not in _READ and name not in _IDLE and value not in (None, False, own.get(name))
    ]
    return [f"tokenizer_config.json: not used here are {listed(sorted(names), 8)}"] if names else []


def _unneeded(folder: Path, sources: set[str], is_config_needed: bool) -> tuple[str, ...]:
    """The files that say nothing beyond the base's. The two that name special tokens stay or go together."""
    needed = set(sources)
    if is_config_needed or needed & {TOKENIZER_CONFIG.name, SPECIAL_TOKENS_MAP.name, ADDED_TOKENS.name}:
        needed |= {TOKENIZER_CONFIG.name, SPECIAL_TOKENS_MAP.name}
    files = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
    return tuple(file.name for file in files if file.name not in needed and (folder / file.name).exists())


def _invalid(file: AdapterFile, why: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{file.name} cannot be used: {why}. Send the files of the tokenizer that the adapter was trained with, on the "
        "base it was trained on; or none, if that was the base's own.",
        param=file.part,
    )
