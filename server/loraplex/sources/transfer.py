"""Transfer: an adapter that is being fetched: how far it is, how long it may take, how large it may be."""

import time
from collections.abc import Callable, Iterable

from loraplex.errors import AdapterTooLarge, SourceFailed
from loraplex.lora.files import AdapterFile
from loraplex.lora.staging import Staging


class Transfer:
    """`source` is shown to users: without credentials. `max_weights_bytes` bounds the weights file, `timeout` (seconds)
    all tries together. Filled by a worker thread, read by others."""

    def __init__(
        self,
        name: str,
        source: str,
        *,
        max_weights_bytes: int,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name = name
        self.source = source
        self.tries = 0
        self.bytes_done = 0
        self.bytes_total = 0  # of the files that were found so far
        self._max_weights_bytes = max_weights_bytes
        self._timeout = timeout
        self._clock = clock
        self._started = clock()
        self._is_stopped = False

    def begin_try(self) -> None:
        """Everything is fetched anew."""
        self.tries += 1
        self.bytes_done = self.bytes_total = 0

    def stop(self) -> None:
        """Have the worker give up at its next piece."""
        self._is_stopped = True

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._started

    @property
    def seconds_left(self) -> float:
        """Until it is given up, 0 at the least."""
        return max(0.0, self._timeout - self.seconds)

    def check(self) -> None:
        """Raises SourceFailed when the time is over or somebody stopped it."""
        if self._is_stopped:
            raise SourceFailed(f"Fetching {self.source} was stopped.")
        if not self.seconds_left:
            raise SourceFailed(
                f"{self.source} could not be fetched within {self._timeout:g} s ({self.bytes_done} of "
                f"{self.bytes_total} bytes had come). Try again, or start the server with a larger --fetch-timeout."
            )

    def write(self, staging: Staging, file: AdapterFile, size: int, chunks: Iterable[bytes]) -> None:
        """Put a file of `size` bytes into staging. Raises AdapterTooLarge before the first byte, SourceFailed when
        there are not as many, and StorageFull."""
        limit = self._max_weights_bytes if file.max_bytes is None else file.max_bytes
        if size > limit:
            advice = " Start the server with a larger max_upload_bytes to take it." if file.max_bytes is None else ""
            raise AdapterTooLarge(
                f"{file.name} of {self.source} has {size} bytes, and this server takes at most {limit}.{advice}"
            )
        self.bytes_total += size
        with staging.open(file) as out:
            for chunk in chunks:
                self.check()
                if out.nbytes + len(chunk) > size:
                    raise SourceFailed(f"{file.name} of {self.source} has more bytes than the {size} announced.")
                out.write(chunk)
                self.bytes_done += len(chunk)
            if out.nbytes != size:
                raise SourceFailed(f"{file.name} of {self.source} ended after {out.nbytes} of {size} bytes.")
