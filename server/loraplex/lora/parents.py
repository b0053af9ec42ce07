"""Parents: the trees that versions form. A version with a parent means the sum of the deltas on its path to the root.

A parent is one version, chosen when its child is pushed, so a path never changes. A version on which others stand is
not deleted, and no name stands twice on a path: names form no cycles either.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select, tuple_

from loraplex.errors import AdapterConflict, InvalidRequest
from loraplex.lora.database import Database
from loraplex.lora.rows import version_of_row
from loraplex.lora.tables import versions
from loraplex.lora.version import DELETED, READY, Version, refuse_quarantined
from loraplex.routing.names import ModelRef

UNKNOWN_PARENT = "unknown_parent"
"""The code of an error that is none any more when the parent has come."""
_MAX_SHOWN = 10


class Parents:
    """As one sees them who serves the base `base_fingerprint`. Any thread may call any method. Every method raises
    StorageFull when the database refuses."""

    def __init__(self, database: Database, base_fingerprint: str):
        self._database = database
        self._base = base_fingerprint

    def path(self, version: Version) -> tuple[Version, ...]:
        """From the root to `version` itself, in whatever state they are."""
        if version.parent is None:
            return (version,)
        with self._database.reading() as connection:
            return path_to(connection, version, self._base)

    def children(self, version: Version) -> Sequence[str]:
        """The versions that stand directly on `version`, as name@n."""
        with self._database.reading() as connection:
            return children_of(connection, [version])

    def check(self, parent: ModelRef, name: str) -> None:
        """Raises InvalidRequest and AdapterQuarantined if `parent` cannot be that of a version of `name` now."""
        with self._database.reading() as connection:
            check_parent(connection, parent, name, self._base)

    def check_integrity(self) -> None:
        """Raise AssertionError if a parent is not there or of another base, or a name stands twice on a path."""
        with self._database.reading() as connection:
            rows = connection.execute(select(versions).where(versions.c.state == READY, versions.c.parent.is_not(None)))
            for child in [version_of_row(row, self._base) for row in rows]:
                path = path_to(connection, child, self._base)
                where = " <- ".join(one.model_id for one in path)
                assert all(one.state != DELETED for one in path), f"gone: {where}"
                assert {one.base_fingerprint for one in path} == {child.base_fingerprint}, f"several bases: {where}"
                assert len({one.name for one in path}) == len(path), f"a name twice: {where}"


def path_to(connection: Connection, version: Version, base_fingerprint: str) -> tuple[Version, ...]:
    path = [version]
    while (parent := path[-1].parent) is not None:
        row = connection.execute(select(versions).where(_is(parent))).one()
        path.append(version_of_row(row, base_fingerprint))
    return tuple(reversed(path))


def children_of(connection: Connection, parents: Sequence[Version]) -> Sequence[str]:
    """The versions, of whatever base, that stand on one of `parents`."""
    places = tuple_(versions.c.parent, versions.c.parent_version)
    query = (
        select(versions.c.name, versions.c.version)
        .where(versions.c.state == READY, places.in_([(one.name, one.version) for one in parents]))
        .order_by(versions.c.name, versions.c.version)
    )
    return [f"{row.name}@{row.version}" for row in connection.execute(query)]


def check_parent(connection: Connection, parent: ModelRef, name: str, base_fingerprint: str) -> None:
    """Whether `parent` can be that of a version of `name`; it stays so while both names are locked. Raises
    InvalidRequest when it was deleted or `name` is on its path, and AdapterQuarantined."""
    query = select(versions).where(_is(parent), versions.c.state == READY)
    row = connection.execute(query.where(versions.c.base_fingerprint == base_fingerprint)).first()
    if row is None:
        raise InvalidRequest(
            f"The parent {parent} was deleted meanwhile. Push the adapter again with another parent, or without one.",
            param="parent",
            code=UNKNOWN_PARENT,
        )
    found = version_of_row(row, base_fingerprint)
    refuse_quarantined(found)
    path = [one.model_id for one in path_to(connection, found, base_fingerprint) if one.name == name]
    if path:
        raise InvalidRequest(
            f"{name!r} cannot stand on {parent}, which is {path[0]} or stands on it: no name can be on a path twice. "
            "Push it under another name, or name another parent.",
            param="parent",
            code="invalid_parent",
        )


def refuse_parents(connection: Connection, doomed: Sequence[Version]) -> None:
    """Within the transaction that deletes `doomed`, their name locked. Raises AdapterConflict naming their children."""
    found = children_of(connection, doomed)
    if found:
        shown = ", ".join(found[:_MAX_SHOWN]) + (f" and {len(found) - _MAX_SHOWN} more" if found[_MAX_SHOWN:] else "")
        which = " or ".join(one.model_id for one in doomed[-_MAX_SHOWN:])
        raise AdapterConflict(
            f"Other adapters stand on {which}: {shown}. Without their parent they would mean something else. Delete "
            "them first.",
            param="model",
            code="adapter_has_children",
        )


def is_additive(report: Mapping[str, Any]) -> bool:
    """Whether the report of an adapter, as JSON, is of deltas alone: only such can be summed."""
    modules = report["modules"]
    return not report["own_parameters"] and all(one["kind"] != "router" and not one.get("with") for one in modules)


def _is(ref: ModelRef):
    return (versions.c.name == ref.name) & (versions.c.version == ref.version)
