"""Frames: JSON values over a socket, each behind its length. Parent and child of a confined process speak so.

Imports nothing but the standard library: the child's start is a part of a request.
"""

import json
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct(">I")


class FrameTooLong(Exception):
    """A frame announces more bytes than the reader takes."""


def send(connection: socket.socket, value: Any, deadline: float | None = None) -> None:
    """Raises TimeoutError at `deadline` (of time.monotonic), OSError when the other side is gone."""
    data = json.dumps(value, separators=(",", ":")).encode()
    connection.settimeout(_left(deadline))
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, max_bytes: int, deadline: float | None = None) -> Any:
    """The next value; None when the other side has closed. Raises FrameTooLong, TimeoutError, OSError, ValueError."""
    head = _read(connection, _LENGTH.size, deadline)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > max_bytes:
        raise FrameTooLong(f"{length} bytes")
    data = _read(connection, length, deadline)
    return None if data is None else json.loads(data)


def _read(connection: socket.socket, count: int, deadline: float | None) -> bytes | None:
    pieces = []
    while count:
        connection.settimeout(_left(deadline))
        piece = connection.recv(min(count, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
