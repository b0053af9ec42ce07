"""An adapter upload: its files and a name, taken from the socket to staging as they arrive.

Nothing is spooled elsewhere first; a client's file names are looked at only to refuse pickle early, never used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from loraplex.api.errors import UnsupportedMediaType
from loraplex.errors import InvalidRequest
from loraplex.lora.files import FILES, REQUIRED
from loraplex.lora.headers import refuse_pickle_name
from loraplex.lora.staging import StagedFile, Staging

MAX_TEXT_BYTES = 256
_FILE_OF = {file.part: file for file in FILES}


@dataclass(slots=True)
class _Part:
    name: str = ""
    file: StagedFile | None = None


class AdapterUpload:
    """Feeds a multipart body into a staging: `name`, `parent` (which need not be there), `config`, `weights` and the
    other parts of `files.FILES`, each at most once, in any order. `checks`: what the two texts have to pass, as soon as
    they have come."""

    def __init__(self, staging: Staging, boundary: bytes, checks: Mapping[str, Callable[[str], object]]):
        self._checks = checks
        self._staging = staging
        self._seen: set[str] = set()
        self._texts: dict[str, bytearray] = {}
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
            },
        )
        self._disposition = b""

    def feed(self, chunk: bytes) -> None:
        """Take in some of the body. Blocking (it writes to disk)."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise InvalidRequest(f"The multipart body is malformed: {error}") from error

    def finish(self) -> tuple[str, str | None]:
        """The end of the body: returns the name and the parent that were sent."""
        try:
            self._parser.finalize()
        except MultipartParseError as error:
            raise InvalidRequest(f"The multipart body ends early: {error}") from error
        missing = [part for part in ("name", *(file.part for file in REQUIRED)) if part not in self._seen]
        if missing:
            raise InvalidRequest(
                f"The upload lacks {', '.join(missing)}. Send three parts: name, config (adapter_config.json) and "
                "weights (adapter_model.safetensors).",
                param=missing[0],
            )
        return self._text("name"), self._text("parent") if "parent" in self._seen else None

    def _text(self, part: str) -> str:
        return self._texts[part].decode("utf-8", "replace")

    def close(self) -> None:
        """Close a file that was being written when the upload broke off."""
        if self._part.file is not None:
            file, self._part.file = self._part.file, None
            file.__exit__(ConnectionError, None, None)

    def _on_part_begin(self) -> None:
        self._part = _Part()
        self._disposition = b""

    def _on_header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            self._disposition = value

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")[:64]
        filename = options.get(b"filename")
        if name not in self._checks and name not in _FILE_OF:
            others = ", ".join(file.part for file in FILES if file not in REQUIRED)
            raise InvalidRequest(
                f"The upload has an unknown part {name!r}; expected are name, config and weights, and there may be "
                f"parent, {others}."
            )
        if name in self._seen:
            raise InvalidRequest(f"The upload has the part {name!r} twice.")
        self._seen.add(name)
        self._part.name = name
        if name in _FILE_OF:
            if filename is not None:
                refuse_pickle_name(filename.decode("utf-8", "replace"))
            self._part.file = self._staging.open(_FILE_OF[name])
            self._part.file.__enter__()
        else:
            self._texts[name] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.file is not None:
            self._part.file.write(memoryview(data)[start:end])
        else:
            name = self._part.name
            self._texts[name].extend(data[start:end])
            if len(self._texts[name]) > MAX_TEXT_BYTES:
                raise InvalidRequest(f"The part {name!r} is too long.", param=name)

    def _on_part_end(self) -> None:
        if self._part.file is not None:
            file, self._part.file = self._part.file, None
            file.__exit__(None, None, None)
        else:
            self._checks[self._part.name](self._text(self._part.name))  # now, not after gigabytes of weights


def boundary_of(request: Request) -> bytes:
    """The multipart boundary, or InvalidRequest saying how to send an upload."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedMediaType(
            "Send an adapter as multipart/form-data: curl -F name=NAME -F config=@adapter_config.json "
            "-F weights=@adapter_model.safetensors"
        )
    return boundary
