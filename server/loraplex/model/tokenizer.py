"""Tokenizer: text to ids and back, and chat messages to a prompt with the operator's template.

Encoding goes to the Rust tokenizer directly: the wrapper of transformers changes shared state on every call and may
not be used from several threads.
"""

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from loraplex.errors import InvalidRequest, StartupError
from loraplex.model.detokenizer import Detokenizer

MAX_RENDERED_CHARS = 4_000_000
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def require_unicode(text: str) -> None:
    """Raise ValueError for half a surrogate pair: JSON can spell it, UTF-8 and tokenizers cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"holds half of a surrogate pair at character {error.start}") from None


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token beside the vocabulary, as tokenizer.json has it in `added_tokens`."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class Tokenizer:
    """`chat_template` None: the tokenizer's own, if it has one. `folder`: where its files are, if it was loaded."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None, folder: Path | None = None
    ):
        self._backend: RustTokenizer = tokenizer.backend_tokenizer
        self._byte_of = _byte_alphabet() if _is_byte_level(self._backend) else {}
        named = tokenizer.special_tokens_map
        self.special_tokens: Mapping[str, str] = {name: str(token) for name, token in named.items()}
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        self.chat_template: str | None = own if chat_template is None else chat_template
        self.folder = folder

    @classmethod
    def load(cls, folder: str | Path, chat_template: Path | None = None) -> "Tokenizer":
        """The tokenizer of a model folder; `chat_template` replaces its template. Raises StartupError."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise StartupError(f"The tokenizer of {folder} cannot be read: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise StartupError(
                f"The tokenizer of {folder} is a {type(tokenizer).__name__}, which has no tokenizer.json. Save it in "
                "the fast format (tokenizer.save_pretrained with a PreTrainedTokenizerFast)."
            )
        template = None
        if chat_template is not None:
            try:
                template = chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise StartupError(f"The chat template {chat_template} cannot be read: {error}") from error
        return cls(tokenizer, template, Path(folder))

    def changed(self, tokens: Sequence[NewToken], special_tokens: Mapping[str, str]) -> "Tokenizer":
        """This one with `tokens` added, or in place of those of the same ids, and other named special tokens. Raises
        ValueError when a token cannot have its id."""
        other = copy.copy(self)
        other.special_tokens = dict(special_tokens)
        if any(self._backend.id_to_token(token.id) is not None for token in tokens):
            document = json.loads(self._backend.to_str())
            added = {token["id"]: token for token in document["added_tokens"]} | {one.id: asdict(one) for one in tokens}
            document["added_tokens"] = [added[token_id] for token_id in sorted(added)]
            other._backend = RustTokenizer.from_str(json.dumps(document))
        elif tokens:  # the usual case, without a vocabulary in Python's hands
            other._backend = RustTokenizer.from_str(self._backend.to_str())
            for is_special, group in itertools.groupby(tokens, key=lambda token: token.special):
                add = other._backend.add_special_tokens if is_special else other._backend.add_tokens
                add([_added_token(token) for token in group])
        for token in tokens:
            got = other._backend.token_to_id(token.content)
            if got != token.id:
                raise ValueError(f"the token {token.content[:64]!r} would have the id {got}, not {token.id}")
        return other

    @property
    def backend(self) -> RustTokenizer:
        return self._backend

    @property
    def eos_token_id(self) -> int | None:
        token = self.special_tokens.get("eos_token")
        return None if token is None else self._backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest for text that is no Unicode."""
        try:
            require_unicode(text)
        except ValueError as error:
            raise InvalidRequest(f"The text {error}.", param="prompt") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Render `messages` with the chat template and encode the result. Raises InvalidRequest."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )
        return self.encode_rendered(text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """What the template makes of `messages`, as transformers' apply_chat_template has it. Raises InvalidRequest."""
        if self.chat_template is None:
            raise InvalidRequest(
                "There is no chat template: this model brings none. Push the adapter with a chat_template.jinja, start "
                "the server with --chat-template FILE, or use /v1/completions with a prompt.",
                param="messages",
                code="no_chat_template",
            )
        try:
            [text], _ = render_jinja_template(
                # some clients send null for what they leave out, which templates would print
                [[{name: value for name, value in one.items() if value is not None} for one in messages]],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **self.special_tokens,  # type: ignore[arg-type]
            )
        except Exception as error:  # the template is the operator's, so whatever it was, the messages brought it about
            why = str(error)[:500] if isinstance(error, TemplateError | ValueError) else repr(error)[:500]
            raise InvalidRequest(f"The chat template refused the messages: {why}", param="messages") from error
        return text

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered chat; its special tokens come from the template alone. Raises InvalidRequest."""
        if len(text) > MAX_RENDERED_CHARS:
            raise InvalidRequest("The rendered chat is too long.", param="messages")
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token by itself; half a character shows as U+FFFD."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token by itself, half characters too; put together they are the text's."""
        name = self.token_name(token_id)
        if name is not None and self._byte_of and all(char in self._byte_of for char in name):
            return bytes(self._byte_of[char] for char in name)
        if name is not None and (fallback := _FALLBACK.fullmatch(name)):
            return bytes([int(fallback[1], 16)])
        return self.token_text(token_id).encode()

    def token_name(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id it does not have."""
        return self._backend.id_to_token(token_id)

    def detokenizer(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self._backend, prompt_ids, skip_special_tokens=skip_special_tokens)


def _added_token(token: NewToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _is_byte_level(backend: RustTokenizer) -> bool:
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if part)


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE spells bytes: printable ones as they are, the others moved up by 256 in order (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
