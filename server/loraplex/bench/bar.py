"""Bar: one thing that DESIGN §8 asks for, with what was measured."""

from dataclasses import asdict, dataclass
from typing import Any

NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """`limit` is the least or (`is_least` false) the most. `measured` None: see `note`. `is_elsewhere`: the limit is of
    another machine. `bound`: what the machine itself allows, where that was reckoned."""

    bar: str
    limit: float
    unit: str
    measured: float | None
    is_least: bool = True
    is_elsewhere: bool = False
    note: str = NOT_MEASURED
    bound: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.is_least else self.measured <= self.limit

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_met": self.is_met}
