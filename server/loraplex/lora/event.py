"""Event: a change of the registry: who did what to which adapter or route, and when."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

PUSH = "push"
ROLLBACK = "rollback"
DELETE = "delete"
QUARANTINE = "quarantine"
PIN = "pin"
UNPIN = "unpin"

ROUTE_SET = "route_set"
ROUTE_RAMP = "route_ramp"
ROUTE_PROMOTE = "route_promote"
ROUTE_ROLLBACK = "route_rollback"
ROUTE_DELETE = "route_delete"

EVALUATION_SET = "evaluation_set"
EVALUATION_DELETE = "evaluation_delete"

LOCAL = "local"
"""Somebody on a server that asks for no key."""
OPERATOR = "operator"
"""Whoever started the server, with its flags and folders."""
SERVER = "server"
"""The server itself, by what it saw."""


@dataclass(frozen=True, slots=True)
class Event:
    """`id` grows with every change; `at` is what the clock said (UTC). `who` is LOCAL, OPERATOR, SERVER, or "key:" and
    the beginning of the SHA-256 of the caller's key. `detail` is a JSON object: the digest of the files, what the name
    meant before (`was`) and means since (`now`). Of a route `version` is the revision, `was` and `now` are documents
    (None: there was none), and `reason` says why the server changed it; of an evaluation set `version` is its own
    revision."""

    id: int
    at: datetime
    who: str
    action: str
    name: str
    version: int | None
    detail: Mapping[str, Any] = field(hash=False)
