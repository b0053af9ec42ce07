"""BucketSource: an adapter's files below a prefix of S3, Google Cloud Storage or Azure, read with obstore.

Credentials, region and endpoint are those of the environment, by the names that each cloud's own tools use
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …); nothing of them comes from a request or goes into a message.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loraplex.errors import AdapterInvalid, PickleRefused, SourceFailed, SourceNotFound, SourceUnavailable
from loraplex.lora.files import FILES, REQUIRED, AdapterFile
from loraplex.lora.headers import refuse_pickle_name
from loraplex.lora.staging import Staging
from loraplex.sources.transfer import Transfer

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
_PICKLE = "adapter_model.bin"


class BucketSource:
    """`url` has one of SCHEMES, and neither query nor user."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")

    @property
    def shown(self) -> str:
        return self._url

    def fetch(self, staging: Staging, transfer: Transfer) -> None:
        try:
            from obstore.store import from_url
        except ModuleNotFoundError as cause:
            raise SourceFailed("Fetching from buckets needs obstore. Install loraplex[s3] on the server.") from cause
        options = {
            "timeout": f"{max(1, round(transfer.seconds_left))}s",
            "connect_timeout": "5s",
            "allow_http": True,  # whoever sets an endpoint says how it is spoken to; the clouds' own are https
        }
        with self._telling(""):
            # one try here: `Fetching` tries again from the start
            store = from_url(self._url, client_options=options, retry_config={"max_retries": 0})  # type: ignore[arg-type]
        found = [file for file in FILES if self._copy(store, file, staging, transfer)]
        missing = [file.name for file in REQUIRED if file not in found]
        if missing:
            self._explain(store, missing, is_empty=not found)

    def _copy(self, store: "ObjectStore", file: AdapterFile, staging: Staging, transfer: Transfer) -> bool:
        """Whether the file was there."""
        transfer.check()
        with self._telling(file.name):
            try:
                reply = store.get(file.name)
            except FileNotFoundError:
                return False
            size = reply.meta["size"]
            # as they come: in larger pieces a slow store would keep a transfer from noticing that its time is over
            transfer.write(staging, file, size, (bytes(chunk) for chunk in reply.stream(min_chunk_size=1)))
        return True

    def _explain(self, store: "ObjectStore", missing: list[str], *, is_empty: bool) -> None:
        if any(file.name in missing for file in REQUIRED) and self._has(store, _PICKLE):
            refuse_pickle_name(_PICKLE)
            raise PickleRefused(f"{self.shown} has its weights in {_PICKLE}.")
        if is_empty:
            raise SourceNotFound(f"There is no adapter at {self.shown}.")
        raise AdapterInvalid(f"{self.shown} is not a PEFT adapter: it lacks {' and '.join(missing)}.")

    def _has(self, store: "ObjectStore", name: str) -> bool:
        with self._telling(name):
            try:
                store.head(name)
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """obstore's errors as ours, without their text: that may hold addresses with signatures."""
        from obstore import exceptions

        where = f"{self.shown}/{name}".rstrip("/")
        try:
            yield
        except FileNotFoundError:
            raise
        except (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            raise SourceFailed(
                f"{where} may not be read by this server. Give it credentials in its environment that may."
            ) from None
        except (exceptions.GenericError, exceptions.JoinError, OSError):
            raise SourceUnavailable(f"{where} could not be read: the store did not answer, or broke off.") from None
        except exceptions.BaseError as cause:
            raise SourceFailed(f"{where} could not be read ({type(cause).__name__}).") from None
