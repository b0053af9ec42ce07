"""Version: one immutable version of an adapter, as the registry knows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from loraplex.errors import AdapterQuarantined
from loraplex.lora.facts import AdapterFacts
from loraplex.routing.names import ModelRef

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
    accepted; `parent` (None: the base) is the version it stands on, see `parents`. `quarantine` (a JSON object with
    `reason` and `at`) says why a QUARANTINED one is not served.
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
    parent: ModelRef | None = None
    quarantine: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def model_id(self) -> str:
        """The name that requests use for exactly this version."""
        return f"{self.name}@{self.version}"

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.name, self.version)

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


def refuse_quarantined(version: Version) -> None:
    """Raises AdapterQuarantined for one that is."""
    if version.state == QUARANTINED:
        why = version.quarantine or {}
        raise AdapterQuarantined(
            f"{version.model_id!r} is in quarantine since {why.get('at', 'a while')} and does not answer: "
            f"{why.get('reason', 'it failed while it ran')} Push a corrected version (or these files again, to have "
            f"them proven anew), roll {version.name!r} back, or delete {version.model_id!r}.",
            param="model",
        )
