"""Source: where an adapter's files can be fetched."""

from typing import Protocol

from loraplex.lora.staging import Staging
from loraplex.sources.transfer import Transfer


class Source(Protocol):
    @property
    def shown(self) -> str:
        """What users, logs and the registry see: no credentials, no query."""
        ...

    def fetch(self, staging: Staging, transfer: Transfer) -> None:
        """Put the files of `lora.files.FILES` that are there into staging. Blocking. Raises SourceFailed (of which
        SourceUnavailable is worth another try), AdapterInvalid, AdapterTooLarge, PickleRefused, StorageFull."""
        ...
