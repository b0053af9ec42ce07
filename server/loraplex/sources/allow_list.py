"""AllowList: what the operator lets adapters be fetched from, and the source that a text means."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from loraplex.errors import SourceRefused
from loraplex.sources.folder import FolderSource
from loraplex.sources.source import Source


class AllowList:
    """`roots`: folders of --allow-adapter-root."""

    def __init__(self, roots: Sequence[Path]):
        self._roots = [(Path(os.path.abspath(root)), root.resolve()) for root in roots]

    def source(self, text: str) -> Source:
        """The source that `text` names. Raises SourceRefused for what is not allowed or not understood."""
        if not text or len(text) > 1024 or any(ord(character) < 32 for character in text):
            raise SourceRefused("A source is a path or an address of at most 1,024 printable characters.")
        scheme, sign, _ = text.partition("://")
        if sign:
            raise SourceRefused(f"This server fetches nothing from {scheme[:16]}:// addresses.")
        return self._folder(text)

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
