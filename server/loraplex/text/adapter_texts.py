"""AdapterTexts: the text sides of all adapters: checked when they come, kept at hand while they serve.

Used from one event loop; files are read and tokenizers made in worker threads, templates rendered in the sandbox.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from loraplex.errors import AdapterInvalid, AdapterLoadFailed, InvalidRequest
from loraplex.lora.files import CHAT_TEMPLATE, TOKENIZER_FILES
from loraplex.lora.version import Version
from loraplex.model.tokenizer import NewToken, Tokenizer
from loraplex.text.adapter_text import NO_PROFILE, AdapterText, Brought, read_brought
from loraplex.text.template_sandbox import TemplateFailed, TemplateSandbox
from loraplex.text.tokenizer_identity import TokenizerIdentity

MAX_OWN_TOKENIZERS = 16
"""Tokenizers with added tokens that stay in memory, least recently used out first: tens of MiB each for a vocabulary of
a hundred thousand. One that is not there is made again, in less than a second."""
MAX_CACHED_CHARS = 32 << 20
"""Characters of the templates and profiles that stay in memory."""
_SAMPLE = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello. What can I do?"},
    {"role": "user", "content": "Tell me a story."},
]
_OTHER_SAMPLES = (_SAMPLE[:1], [{"role": "system", "content": "Be kind."}, *_SAMPLE])


class AdapterTexts:
    """`num_rows`: of the base's embedding. Closed by `close`."""

    def __init__(self, base: Tokenizer, num_rows: int, sandbox: TemplateSandbox | None = None):
        self._base = base
        self._base_text = AdapterText(base)
        self._num_rows = num_rows
        self._identity = TokenizerIdentity(base)
        self._sandbox = TemplateSandbox() if sandbox is None else sandbox
        self._brought: LRUCache[str, Brought] = LRUCache(MAX_CACHED_CHARS, _size)
        self._tokenizers: LRUCache[str, Tokenizer] = LRUCache(MAX_OWN_TOKENIZERS)
        self._checked: LRUCache[str, tuple[str, ...]] = LRUCache(1024)  # template -> notes
        self._fitting: LRUCache[tuple[NewToken, ...], bool] = LRUCache(1024)
        self._loading = asyncio.Lock()

    async def close(self) -> None:
        await self._sandbox.close()

    # -- in ---------------------------------------------------------------------------------------------------

    async def inspect(self, folder: Path) -> Brought:
        """Check the text files of an upload or an operator's folder. Raises AdapterInvalid."""
        brought = await asyncio.to_thread(read_brought, folder, self._base, self._identity, self._num_rows)
        if brought.change.tokens and brought.change.tokens not in self._fitting:
            await asyncio.to_thread(brought.change.apply, self._base)  # raises if its tokens do not fit
            self._fitting[brought.change.tokens] = True
        if brought.template is None:
            return brought
        special = brought.change.special_tokens
        notes = await self._check_template(brought.template, self._base.special_tokens if special is None else special)
        return replace(brought, notes=(*brought.notes, *notes))

    async def _check_template(self, source: str, special_tokens: Mapping[str, str]) -> tuple[str, ...]:
        """Render a sample, and others if that fails. Raises AdapterInvalid for a template that fails on all of them;
        one that raises its own exception is fine."""
        key = hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()
        if key in self._checked:
            return self._checked[key]
        notes: tuple[str, ...] = ()
        try:
            if not (await self._sandbox.render(source, _SAMPLE, special_tokens, is_check=True)).strip():
                raise TemplateFailed("failed", "it says nothing")
        except TemplateFailed as error:
            words = {
                "syntax": "does not compile",
                "security": "reaches for what templates may not have",
                "limit": "runs into this server's limits with a conversation of three messages",
            }
            if error.kind in words:
                raise AdapterInvalid(
                    f"{CHAT_TEMPLATE.name} {words[error.kind]}: {error.message}. Correct the template, or send the "
                    "upload without it to use the base's.",
                    param=CHAT_TEMPLATE.part,
                ) from error
            if error.kind == "failed" and not await self._renders_any(source, special_tokens):
                raise AdapterInvalid(
                    f"{CHAT_TEMPLATE.name} fails on every sample conversation, or says nothing. With one of three "
                    f"messages: {error.message[:200]}. Correct the template, or send the upload without "
                    "it to use the base's.",
                    param=CHAT_TEMPLATE.part,
                ) from error
            said = "refused" if error.kind == "raised" else "failed on"
            notes = (f"the chat template {said} a sample conversation without a system message: {error.message[:200]}",)
        self._checked[key] = notes
        return notes

    async def _renders_any(self, source: str, special_tokens: Mapping[str, str]) -> bool:
        for sample in _OTHER_SAMPLES:
            try:
                if (await self._sandbox.render(source, sample, special_tokens, is_check=True)).strip():
                    return True
            except TemplateFailed as error:
                if error.kind == "raised":
                    return True
        return False

    # -- out --------------------------------------------------------------------------------------------------

    async def of(self, version: Version | None, folder: Path | None) -> AdapterText:
        """The text side of a version whose files lie in `folder` (None: the base). Raises AdapterLoadFailed."""
        if version is None or folder is None or not version.facts.text_files:
            return self._base_text
        brought = self._brought.get(version.digest)
        if brought is None:
            async with self._loading:
                brought = self._brought.get(version.digest)
                if brought is None:
                    brought = await asyncio.to_thread(self._load, version, folder)
                    if _size(brought) <= MAX_CACHED_CHARS:
                        self._brought[version.digest] = brought
        return AdapterText(
            tokenizer=(tokenizer := await self._tokenizer(version, brought)),
            template=None if brought.template == tokenizer.chat_template else brought.template,
            profile=brought.profile or NO_PROFILE,
            end_token_ids=frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id}),
        )

    def _load(self, version: Version, folder: Path) -> Brought:
        try:
            for name, expected in version.facts.text_files.items():
                data = (folder / name).read_bytes()
                if hashlib.sha256(data).hexdigest() != expected:
                    raise OSError(f"{name} no longer has the recorded SHA-256: the disk or someone changed it")
            return read_brought(folder, self._base, self._identity, self._num_rows)
        except (OSError, AdapterInvalid) as error:
            raise AdapterLoadFailed(
                f"The text files of {version.model_id} could not be loaded: {error}. Push the adapter again, or "
                "restore its files."
            ) from error

    async def _tokenizer(self, version: Version, brought: Brought) -> Tokenizer:
        """The base's, or one that adapters with the same tokenizer files share."""
        if brought.change.is_nothing:
            return self._base
        key = _tokenizer_key(version.facts.text_files)
        tokenizer = self._tokenizers.get(key)
        if tokenizer is None:
            async with self._loading:
                tokenizer = self._tokenizers.get(key)
                if tokenizer is None:
                    tokenizer = await asyncio.to_thread(brought.change.apply, self._base)
                    self._tokenizers[key] = tokenizer
        return tokenizer

    async def encode_chat(
        self,
        text: AdapterText,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """A chat as token ids, with the profile's system prompt and the adapter's template. Raises InvalidRequest."""
        messages = text.with_system_prompt(messages)
        if text.template is None:
            return await asyncio.to_thread(
                text.tokenizer.encode_chat,
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        try:
            rendered = await self._sandbox.render(
                text.template,
                messages,
                text.tokenizer.special_tokens,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except TemplateFailed as error:
            if error.kind == "limit":
                raise InvalidRequest(
                    f"The adapter's chat template cannot be run: {error.message}. Correct the adapter's template, or "
                    "use /v1/completions with a prompt.",
                    param="messages",
                    code="chat_template_limit",
                ) from error
            why = f"The chat template refused the messages: {error.message}"
            raise InvalidRequest(why, param="messages") from error
        return await asyncio.to_thread(text.tokenizer.encode_rendered, rendered)


def _size(brought: Brought) -> int:
    return 1024 + len(brought.template or "") + len(brought.profile.system_prompt or "" if brought.profile else "")


def _tokenizer_key(text_files: Mapping[str, str]) -> str:
    return "/".join(text_files.get(file.name, "") for file in TOKENIZER_FILES)
