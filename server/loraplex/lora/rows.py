"""Rows of the registry's tables <-> Version and Event."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from loraplex.lora.event import Event
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.version import INCOMPATIBLE, QUARANTINED, READY, Version
from loraplex.routing.names import ModelRef


def row_of_version(version: Version) -> dict[str, Any]:
    """The columns of `versions` that never change."""
    facts = version.facts
    return {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "base_fingerprint": version.base_fingerprint,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "use_rslora": facts.use_rslora,
        "num_modules": facts.num_modules,
        "target_modules": list(facts.target_modules),
        "dtype": facts.dtype,
        "nbytes": facts.nbytes,
        "num_values": facts.num_values,
        "text_files": dict(facts.text_files),
        "profile": None if facts.profile is None else dict(facts.profile),
        "source": version.source,
        "created_at": version.created_at,
        "report": None if version.report is None else dict(version.report),
        "proof": None if version.proof is None else dict(version.proof),
        "parent": version.parent and version.parent.name,
        "parent_version": version.parent and version.parent.version,
    }


def version_of_row(row: Row[Any], base_fingerprint: str) -> Version:
    """As one sees it who serves the base `base_fingerprint`."""
    facts = AdapterFacts(
        rank=row.rank,
        alpha=row.alpha,
        use_rslora=row.use_rslora,
        num_modules=row.num_modules,
        target_modules=tuple(row.target_modules),
        dtype=row.dtype,
        nbytes=row.nbytes,
        num_values=row.num_values,
        text_files=row.text_files,
        profile=row.profile,
    )
    state = row.state
    if state == READY and row.base_fingerprint != base_fingerprint:
        state = INCOMPATIBLE
    elif state == READY and row.quarantine is not None:
        state = QUARANTINED
    return Version(
        name=row.name,
        version=row.version,
        digest=row.digest,
        base_fingerprint=row.base_fingerprint,
        state=state,
        created_at=in_utc(row.created_at),
        source=row.source,
        facts=facts,
        report=row.report,
        proof=row.proof,
        parent=None if row.parent is None else ModelRef(row.parent, row.parent_version),
        quarantine=row.quarantine,
    )


def event_of_row(row: Row[Any]) -> Event:
    return Event(row.id, in_utc(row.at), row.who, row.action, row.name, row.version, row.detail)


def in_utc(at: datetime) -> datetime:
    # SQLite drops the zone; what is stored is UTC
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
