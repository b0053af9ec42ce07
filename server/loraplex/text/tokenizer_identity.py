"""TokenizerIdentity: whether a tokenizer.json is the base's own tokenizer, and which tokens it adds."""

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetools import LRUCache
from tokenizers import Tokenizer as RustTokenizer

from loraplex.errors import AdapterInvalid, NotReady
from loraplex.lora.digest import file_sha256
from loraplex.lora.files import TOKENIZER
from loraplex.lora.text import shown
from loraplex.model.tokenizer import NewToken, Tokenizer
from loraplex.text.child import Child, ChildDied, ChildNotStarted, ChildTimeout

READER = "loraplex.text.tokenizer_reader"
# A tokenizer.json of 40 MB (262,000 tokens, 580,000 merges) took 3 s and less than 512 MiB.
_SECONDS = 30.0
_MEMORY_BYTES = 1 << 30
_MAX_ANSWER_BYTES = 32 << 20
_MAX_CONTENT_CHARS = 256
_DIFFERENCES = {
    "vocabulary": "its vocabulary differs",
    "merges": "its merges differ",
    "model": "its model's settings differ",
    "normalizer": "its normalizer differs",
    "pre_tokenizer": "its pre-tokenizer differs",
    "decoder": "its decoder differs",
}
# It decides only which special tokens a prompt gets around it; see `TokenizerChange`.
POST_PROCESSOR = "post_processor"


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """What a tokenizer.json says: a digest of every part, and the tokens beside its vocabulary."""

    parts: Mapping[str, str]
    tokens: tuple[NewToken, ...]


class TokenizerIdentity:
    """Compares with `base`. Any thread may call; the base's files are read when they are first needed."""

    def __init__(self, base: Tokenizer):
        self._base = base
        self._lock = threading.Lock()
        self._own: list[TokenizerJson] | None = None
        self._known: LRUCache[bytes, TokenizerJson] = LRUCache(256)

    def read(self, path: Path) -> TokenizerJson:
        """The tokenizer.json `path` of an adapter. Raises AdapterInvalid when it cannot be read or is another
        tokenizer than the base's."""
        try:
            sha256 = file_sha256(path, follow_symlinks=True)
            with self._lock:
                found = self._known.get(sha256)
                if found is None:
                    found = self._known[sha256] = read_tokenizer_json(path)
                own = self._spellings_of_base()
        except OSError as cause:
            raise AdapterInvalid(
                f"{TOKENIZER.name} cannot be read: {cause}. Send it again.", param="tokenizer"
            ) from cause
        for part, difference in _DIFFERENCES.items():
            if all(found.parts[part] != one.parts[part] for one in own):
                raise AdapterInvalid(
                    f"{TOKENIZER.name} is another tokenizer than the base's: {difference}. An adapter is served with "
                    "the base's tokenizer, to which it may add tokens. If it was trained with the base's own, leave "
                    "this file out; else serve it on the base it was trained on.",
                    param="tokenizer",
                )
        return found

    def has_own_post_processor(self, found: TokenizerJson) -> bool:
        """Whether it puts other special tokens around a prompt than the base's."""
        with self._lock:
            return all(found.parts[POST_PROCESSOR] != one.parts[POST_PROCESSOR] for one in self._spellings_of_base())

    def has_token(self, token: NewToken) -> bool:
        """Whether the base has this very token beside its vocabulary."""
        with self._lock:
            return any(token in one.tokens for one in self._spellings_of_base())

    def _spellings_of_base(self) -> list[TokenizerJson]:
        """The base's own file, as it is and as today's `tokenizers` writes it, and what transformers made of it."""
        if self._own is None:
            spellings = [self._base.backend.to_str()]
            own = []
            file = None if self._base.folder is None else self._base.folder / TOKENIZER.name
            if file is not None and file.is_file():
                own.append(read_tokenizer_json(file))
                spellings.append(RustTokenizer.from_file(str(file)).to_str())
            with tempfile.TemporaryDirectory() as folder:
                for text in spellings:
                    path = Path(folder) / TOKENIZER.name
                    path.write_text(text, encoding="utf-8")
                    own.append(read_tokenizer_json(path))
            self._own = own
        return self._own


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Read it in a confined process. Raises AdapterInvalid, NotReady."""
    child = None
    try:
        limits = {"memory_bytes": _MEMORY_BYTES, "cpu_seconds": int(_SECONDS), "max_bytes": TOKENIZER.max_bytes}
        child = Child(READER, {"path": str(path.resolve()), **limits})
        answer = child.exchange({}, _SECONDS, _MAX_ANSWER_BYTES)
        if "error" in answer:
            raise _invalid(answer["error"])
        return TokenizerJson(answer["parts"], tuple(new_token(token) for token in answer["added_tokens"]))
    except ChildNotStarted as error:
        raise NotReady(f"{TOKENIZER.name} cannot be read: the process for it does not start ({error}).") from error
    except (ChildDied, ChildTimeout) as error:
        raise _invalid(str(error)) from error
    finally:
        if child is not None:
            child.close()


def new_token(document: Any, token_id: Any = None) -> NewToken:
    """A token as tokenizer.json or tokenizer_config.json describes it. Raises AdapterInvalid."""
    if not isinstance(document, dict):
        raise _invalid(f"an added token is described by {shown(document)}")
    token_id = document.get("id") if token_id is None else token_id
    content = document.get("content")
    flags = {name: document.get(name, False) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    if (
        not isinstance(token_id, int)
        or isinstance(token_id, bool)
        or not 0 <= token_id < 1 << 31
        or not isinstance(content, str)
        or not 0 < len(content) <= _MAX_CONTENT_CHARS
        or not all(isinstance(flag, bool) for flag in flags.values())
    ):
        raise _invalid(f"the added token {shown(content)} has no id, or content and flags that cannot be used")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise _invalid(f"the added token {token_id} is no Unicode text") from None
    return NewToken(token_id, content, **flags)


def _invalid(why: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{TOKENIZER.name} cannot be read: {why}. Send the file that the tokenizer's save_pretrained wrote, or leave "
        "it out if the adapter was trained with the base's tokenizer.",
        param="tokenizer",
    )
