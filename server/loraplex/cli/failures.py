"""How a command fails: its exit code, and its error as a person or a program reads it.

0   well
1   something failed on the way: it is named, and what else could be done is done
2   wrong usage, settings or files
3   no server answers
4   the server refused (4xx), or `check` says that one would
5   the server failed (5xx): another try may help
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from loraplex import errors
from loraplex.errors import LoraplexError

FAILED, USAGE, NO_SERVER, REFUSED, SERVER_FAILED = 1, 2, 3, 4, 5


class UsageError(LoraplexError):
    """Arguments, settings or files that do not fit, or are not there."""

    code = "usage"


class CommandFailed(LoraplexError):
    """What was asked for went wrong on the way."""

    code = "failed"


class NotDone(CommandFailed):
    """One of several things cannot be done; the others can."""

    code = "not_done"


class NoServer(LoraplexError):
    code = "no_server"


class ServerRefused(LoraplexError):
    """The server answered with an error of that status. `status` None: one would, says `check`."""

    code = "server_refused"

    def __init__(self, message: str, status: int | None = None, *, code: str | None = None, param: str | None = None):
        super().__init__(message, param=param, code=code)
        self.status = status


_EXIT_CODES: dict[type[LoraplexError], int] = {
    CommandFailed: FAILED,
    NoServer: NO_SERVER,
    ServerRefused: REFUSED,
    errors.AdapterLoadFailed: FAILED,
    errors.InsufficientMemory: FAILED,
    errors.StorageFull: FAILED,
    errors.Overloaded: FAILED,
    errors.NotReady: FAILED,
    errors.RequestFailed: FAILED,
    LoraplexError: USAGE,
}


def exit_code_of(error: LoraplexError) -> int:
    if isinstance(error, ServerRefused) and (error.status or 0) >= 500:
        return SERVER_FAILED
    return next(_EXIT_CODES[kind] for kind in type(error).__mro__ if kind in _EXIT_CODES)


def error_object(error: LoraplexError) -> dict[str, Any]:
    """OpenAI's, and the reply's `status`, null where there was none."""
    status = error.status if isinstance(error, ServerRefused) else None
    kind = "client_error" if status is None else "invalid_request_error" if status < 500 else "server_error"
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code, "status": status}


def tell(error: LoraplexError, *, as_json: bool) -> None:
    """On stderr for a person; as one line of JSON on stdout."""
    if as_json:
        typer.echo(json.dumps({"error": error_object(error)}))
    else:
        _say(("error ", "bold red"), error.message)


class LeftOut:
    """What a command could not do and goes on without: named on stderr at once, and in `rows`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def unless_done(self, what: str) -> Iterator[None]:
        """Leave `what` out when the block fails and other blocks need not."""
        try:
            yield
        except (NotDone, ServerRefused) as error:
            self.rows.append({"id": what, "error": error_object(error)})
            _say(("left out ", "bold yellow"), f"{what}: {error.message}")

    def end(self) -> None:
        """Ends the command with FAILED if something was left out."""
        if self.rows:
            raise typer.Exit(FAILED)


def _say(label: tuple[str, str], message: str) -> None:
    # Text, not markup: a message may quote what the user typed.
    Console(stderr=True).print(Text.assemble(label, message), soft_wrap=True)
