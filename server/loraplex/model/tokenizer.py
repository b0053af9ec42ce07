"""Tokenizer: text to ids and back, and chat messages to a prompt.

Encoding goes to the Rust tokenizer directly: the wrapper of transformers changes shared state on every call and may
not be used from several threads.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


class Tokenizer:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None):
        self._hf = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._byte_of = _byte_alphabet() if _is_byte_level(self._backend) else {}
        if chat_template is not None:
            tokenizer.chat_template = chat_template

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
        return cls(tokenizer, template)

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id  # type: ignore[return-value]

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._hf.chat_template is not None

    @property
    def chat_template(self) -> str | None:
        template = self._hf.chat_template
        return template if isinstance(template, str) else None

    @property
    def special_tokens(self) -> dict[str, str]:
        return {name: str(token) for name, token in self._hf.special_tokens_map.items() if isinstance(token, str)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest for text that is no Unicode."""
        try:
            require_unicode(text)
        except ValueError as error:
            raise InvalidRequest(f"The text {error}.", param="prompt") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Render `messages` with the chat template and encode the result. Raises InvalidRequest.

        transformers renders in jinja2's immutable sandbox; special tokens come from the template alone.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions with a prompt, or start the server with "
                "--chat-template FILE.",
                param="messages",
                code="no_chat_template",
            )
        try:
            text = self._hf.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except Exception as error:  # the template is the operator's, so whatever it was, the messages brought it about
            why = str(error)[:500] if isinstance(error, TemplateError | ValueError) else repr(error)[:500]
            raise InvalidRequest(f"The chat template refused the messages: {why}", param="messages") from error
        assert isinstance(text, str), "tokenize=False renders text"
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


def _is_byte_level(backend: RustTokenizer) -> bool:
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if part)


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE spells bytes: printable ones as they are, the others moved up by 256 in order (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
