"""The program that reads one tokenizer.json: a confined process, since parsed JSON is many times its file.

It tells tokenizers apart by parts: a SHA-256 of each in a spelling of its own (what is null or at its default is left
out, merges are pairs), so that files of different releases of `tokenizers` compare as what they mean. Standard library
only.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterable
from typing import Any

from loraplex.text.confinement import Confinement
from loraplex.text.frames import receive, send

MAX_ADDED_TOKENS = 1 << 16
_OFF = {"fuse_unk", "byte_fallback", "ignore_merges"}


def main() -> None:
    connection = socket.socket(fileno=0)
    start = receive(connection, 1 << 16)
    try:
        fd = os.open(start["path"], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        fd, cannot = -1, str(error)
    else:
        cannot = ""
    confinement = Confinement(start["memory_bytes"], start["cpu_seconds"])
    send(connection, {"ready": True})
    while receive(connection, 1 << 10) is not None:
        confinement.renew()
        send(connection, {"error": cannot} if cannot else _answer(fd, start["max_bytes"]))


def _answer(fd: int, max_bytes: int) -> dict[str, Any]:
    try:
        with open(fd, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            return {"error": f"it has more than {max_bytes} bytes"}
        document = json.loads(data)
        del data
        return {"parts": parts_of(document), "added_tokens": _added_tokens(document)}
    except MemoryError:
        return {"error": "it needs more memory than it may have"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def parts_of(document: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of every part of a parsed tokenizer.json that decides about ids and text."""
    model = dict(document["model"])
    vocabulary, merges = model.pop("vocab"), model.pop("merges", None) or ()
    entries = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary
    return {
        "vocabulary": _digest(entries),
        "merges": _digest(pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges),
        "model": _digest([_plain({name: value for name, value in model.items() if value or name not in _OFF})]),
        **{
            part: _digest([_plain(document.get(part))])
            for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        },
    }


def _added_tokens(document: dict[str, Any]) -> list[Any]:
    tokens = document.get("added_tokens") or []
    if not isinstance(tokens, list) or len(tokens) > MAX_ADDED_TOKENS:
        raise ValueError(f"added_tokens is no list of at most {MAX_ADDED_TOKENS} tokens")
    return tokens


def _digest(entries: Iterable[Any]) -> str:
    sha = hashlib.sha256()
    for entry in entries:
        sha.update(json.dumps(entry, sort_keys=True).encode() + b"\n")
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    """`value` without the keys that are null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list) else value
