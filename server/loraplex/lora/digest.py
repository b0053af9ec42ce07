"""The digest of an adapter: what identifies a version, and the only thing that names files on disk.

    digest = hex(SHA-256( SHA-256(adapter_config.json) ‖ SHA-256(adapter_model.safetensors)
                          [ ‖ SHA-256(file's name) ‖ SHA-256(file) for each of files.TEXT_FILES that is there ] ))

The inner digests are joined as 32 raw bytes each, so an adapter of two files has the digest it had before there were
others.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from loraplex.errors import InvalidRequest
from loraplex.lora import files
from loraplex.lora.files import CONFIG, TEXT_FILES, WEIGHTS
from loraplex.lora.text import shown

CONFIG_NAME = CONFIG.name
WEIGHTS_NAME = WEIGHTS.name
MAX_CONFIG_BYTES = files.MAX_CONFIG_BYTES

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20


def adapter_digest(config_sha256: bytes, weights_sha256: bytes, texts: Mapping[str, bytes] | None = None) -> str:
    """The digest of an adapter whose files have these SHA-256 sums (32 bytes each); `texts` by file name."""
    sha = hashlib.sha256(config_sha256 + weights_sha256)
    for file in TEXT_FILES:
        if texts is not None and file.name in texts:
            sha.update(hashlib.sha256(file.name.encode()).digest() + texts[file.name])
    return sha.hexdigest()


def text_sha256(folder: Path, *, leave_out: Collection[str] = (), follow_symlinks: bool = False) -> dict[str, bytes]:
    """SHA-256 of each of TEXT_FILES that `folder` has, by name, without those to `leave_out`. Raises OSError."""
    sums = {}
    for file in TEXT_FILES:
        if file.name not in leave_out and os.path.lexists(folder / file.name):
            sums[file.name] = file_sha256(folder / file.name, follow_symlinks=follow_symlinks)
    return sums


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
