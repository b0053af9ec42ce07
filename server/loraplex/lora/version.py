"""Version: one immutable version of an adapter, as the registry knows it."""

from dataclasses import dataclass
from datetime import datetime

from loraplex.lora.facts import AdapterFacts


@dataclass(frozen=True, slots=True)
class Version:
    """`name@version`. `digest` identifies its files, `base_fingerprint` the base it was checked on.

    `state` is "ready" or "deleted"; `created_at` is in UTC; `source` says where it came from ("upload", a
    folder).
    """

    name: str
    version: int
    digest: str
    base_fingerprint: str
    state: str
    created_at: datetime
    source: str
    facts: AdapterFacts

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
