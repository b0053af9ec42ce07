"""The digest of an adapter: what identifies a version, and the only thing that names files on disk.

    digest = hex(SHA-256( SHA-256(adapter_config.json) ‖ SHA-256(adapter_model.safetensors) ))

The two inner digests are joined as 32 raw bytes each.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from loraplex.errors import InvalidRequest
from loraplex.lora.text import shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20


def adapter_digest(config_sha256: bytes, weights_sha256: bytes) -> str:
    """The digest of an adapter whose two files have these SHA-256 sums (32 bytes each)."""
    return hashlib.sha256(config_sha256 + weights_sha256).hexdigest()


def validate_digest(digest: str) -> str:
    """Return `digest`, or raise InvalidRequest. Only what passes here is ever joined to a path."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(
            f"{shown(digest)} is not a digest. A digest is 64 lower-case hexadecimal digits; "
            "the list of adapters shows the digest of every version."
        )
    return digest


def open_regular(path: Path, *, follow_symlinks: bool = False) -> int:
    """A read-only descriptor of the regular file `path`. Raises OSError; links, pipes, devices too."""
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_symlinks else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def read_chunks(fd: int) -> Iterator[bytes]:
    """The bytes of `fd` from where it stands, at most 1 MiB at a time."""
    while chunk := os.read(fd, _CHUNK):
        yield chunk


def file_sha256(path: Path, *, follow_symlinks: bool = False) -> bytes:
    """SHA-256 of the regular file `path`, 32 bytes. Raises OSError."""
    fd = open_regular(path, follow_symlinks=follow_symlinks)
    try:
        sha = hashlib.sha256()
        for chunk in read_chunks(fd):
            sha.update(chunk)
        return sha.digest()
    finally:
        os.close(fd)
