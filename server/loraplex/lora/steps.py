"""The named steps of what changes the disk tier: where a crash, a refusing disk or another process may come between.

Store and registry call a `Step` at each of them. Outside of tests it does nothing.
"""

from collections.abc import Callable

Step = Callable[[str], None]

STEPS = (
    "stage: folder made",
    "stage: file opened",
    "stage: bytes written",
    "stage: file synced",
    "commit: held",
    "commit: folder synced",
    "commit: damaged blob moved away",
    "commit: renamed",
    "commit: blobs synced",
    "publish: begun",
    "publish: numbered",
    "publish: version written",
    "publish: event written",
    "publish: committed",
    "rollback: begun",
    "rollback: others withdrawn",
    "rollback: event written",
    "rollback: committed",
    "delete: begun",
    "delete: version marked",
    "delete: event written",
    "delete: committed",
    "route: begun",
    "route: revision written",
    "route: event written",
    "route: committed",
    "sweep: locked",
    "sweep: renamed",
    "sweep: synced",
    "sweep: removed",
)
"""In the order in which an adapter meets them; a route has its own."""


def unwatched(name: str) -> None:
    """The Step of a server."""
