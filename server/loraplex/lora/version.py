"""Version: one immutable version of an adapter, as the registry knows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from loraplex.lora.facts import AdapterFacts

READY = "ready"
INCOMPATIBLE = "incompatible"
"""Ready, and checked on another base than that of whoever asks."""
QUARANTINED = "quarantined"
"""Ready, and not served since it gave NaN while it ran."""
DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Version:
    """`name@version`. `digest` identifies its files, `base_fingerprint` the base it was checked on.

    `state` is READY, INCOMPATIBLE, QUARANTINED or DELETED; `created_at` is in UTC; `source` says where it came from
    ("upload", a folder). `report` and `proof` (JSON objects; None: there is none) are what its checks found when it was
    accepted; `parent` is the name of the base or adapter it was made from, as whoever sent it says. `quarantine` (a
    JSON object with `reason` and `at`) says why a QUARANTINED one is not served.
    """

    name: str
    version: int
    digest: str
    base_fingerprint: str
    state: str
    created_at: datetime
    source: str
    facts: AdapterFacts
    report: Mapping[str, Any] | None = field(default=None, hash=False)
    proof: Mapping[str, Any] | None = field(default=None, hash=False)
    parent: str | None = None
    quarantine: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def model_id(self) -> str:
        """The name that requests use for exactly this version."""
        return f"{self.name}@{self.version}"

    @property
    def rank(self) -> int:
        return self.facts.rank

    @property
    def alpha(self) -> float:
        return self.facts.alpha

    @property
    def num_modules(self) -> int:
        return self.facts.num_modules

    @property
    def nbytes(self) -> int:
        """Bytes of both files."""
        return self.facts.nbytes
