"""AllowList: what the operator lets adapters be fetched from, and the source that a text means."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from loraplex.errors import SourceRefused
from loraplex.sources.bucket import SCHEMES, BucketSource
from loraplex.sources.folder import FolderSource
from loraplex.sources.hub import REPOSITORY, REVISION, HubSource
from loraplex.sources.source import Source


class AllowList:
    """`roots`: folders of --allow-adapter-root; `buckets`: addresses with their prefixes (s3://bucket/prefix) of
    --allow-bucket; `repositories`: of --allow-hub, owner/name or owner/*. Raises SourceRefused for what is none."""

    def __init__(
        self,
        roots: Sequence[Path] = (),
        buckets: Sequence[str] = (),
        repositories: Sequence[str] = (),
        *,
        hub_endpoint: str = "https://huggingface.co",
        hub_token: str | None = None,
    ):
        self._roots = [(Path(os.path.abspath(root)), root.resolve()) for root in roots]
        self._buckets = [_checked_bucket(bucket) for bucket in buckets]
        for repository in repositories:
            if not REPOSITORY.fullmatch(repository.removesuffix("*") + ("any" if repository.endswith("/*") else "")):
                raise SourceRefused(f"--allow-hub {repository[:100]!r} is neither owner/name nor owner/*.")
        self._repositories = repositories
        self._hub = (hub_endpoint, hub_token)

    def source(self, text: str) -> Source:
        """The source that `text` names. Raises SourceRefused for what is not allowed or not understood."""
        if not text or len(text) > 1024 or any(ord(character) < 32 for character in text):
            raise SourceRefused("A source is a path or an address of at most 1,024 printable characters.")
        scheme, sign, rest = text.partition("://")
        if not sign:
            return self._folder(text)
        if scheme in SCHEMES:
            return self._bucket(text)
        if scheme == "hf":
            return self._repository(rest)
        raise SourceRefused(
            f"This server fetches nothing from {scheme[:16]!r} addresses; it knows paths, "
            f"{', '.join(f'{one}://' for one in (*SCHEMES, 'hf'))}."
        )

    def _folder(self, text: str) -> Source:
        if not self._roots:
            raise SourceRefused(
                "This server reads adapters from no folder. Start it with --allow-adapter-root DIR, or upload the "
                "files."
            )
        path = PurePath(os.path.normpath(text))
        if ".." in path.parts:
            raise SourceRefused("A path does not lead upwards.")
        for given, real in self._roots:
            if not path.is_absolute():
                if len(self._roots) == 1 or os.path.lexists(real / path):
                    return FolderSource(real, path)
                continue
            for root in (given, real):
                if path.is_relative_to(root):
                    return FolderSource(real, path.relative_to(root))
        raise SourceRefused(
            "The path does not lie below a folder that this server reads adapters from (--allow-adapter-root)."
        )

    def _bucket(self, text: str) -> Source:
        address = _checked_bucket(text)
        if not any(f"{address}/".startswith(f"{allowed}/") for allowed in self._buckets):
            raise SourceRefused(
                "The address does not lie below one that this server reads adapters from (--allow-bucket)."
            )
        return BucketSource(address)

    def _repository(self, text: str) -> Source:
        name, _, revision = text.partition("@")
        if not REPOSITORY.fullmatch(name) or ".." in text:
            raise SourceRefused("A repository of a hub is named hf://owner/name, or hf://owner/name@revision.")
        if revision and not REVISION.fullmatch(revision):
            raise SourceRefused("A revision is a branch, a tag or a commit of the repository.")
        owner = name.partition("/")[0]
        if not {name, f"{owner}/*"} & set(self._repositories):
            raise SourceRefused(f"The repository is not one that this server reads adapters from (--allow-hub {name}).")
        endpoint, token = self._hub
        return HubSource(endpoint, name, revision or "main", token)


def _checked_bucket(text: str) -> str:
    """The address without a slash at its end. Raises SourceRefused."""
    scheme, sign, rest = text.partition("://")
    address = rest.rstrip("/")
    parts = address.split("/")
    is_plain = address.isascii() and address.isprintable() and not set(address) & set("?#@%\\ :")
    if not sign or scheme not in SCHEMES or not is_plain or any(part in ("", ".", "..") for part in parts):
        raise SourceRefused(
            f"A bucket's address is {', '.join(f'{one}://bucket/prefix' for one in SCHEMES)}, without user, port, "
            "query or escapes."
        )
    return f"{scheme}://{address}"
