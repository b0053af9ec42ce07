"""AdapterText: the text side of one adapter, as it serves; and what an adapter's files say of it."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.errors import AdapterInvalid
from loraplex.lora.files import CHAT_TEMPLATE, PROFILE, AdapterFile
from loraplex.model.tokenizer import Tokenizer
from loraplex.text.profile import ServingProfile
from loraplex.text.tokenizer_change import TokenizerChange, read_change
from loraplex.text.tokenizer_identity import TokenizerIdentity

_SYSTEM_ROLES = ("system", "developer")
NO_PROFILE = ServingProfile()


@dataclass(frozen=True, slots=True)
class Brought:
    """What the text files of a folder say. `template` None: they bring none. `unneeded`: files that say nothing beyond
    the base's, and are not kept."""

    template: str | None = None
    change: TokenizerChange = TokenizerChange()
    profile: ServingProfile | None = None
    unneeded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parent(self) -> str | None:
        """The adapter that the profile says they stand on."""
        return None if self.profile is None else self.profile.parent

    def check_rows(self, trained: Container[int]) -> None:
        """Raises AdapterInvalid for new tokens without a trained row."""
        self.change.check_rows(trained)


@dataclass(frozen=True, slots=True)
class AdapterText:
    """How requests for one adapter (or the base) become tokens, and tokens text. `template` None: the tokenizer's own,
    which is the operator's. `end_token_ids`: end tokens besides the base's."""

    tokenizer: Tokenizer
    template: str | None = None
    profile: ServingProfile = NO_PROFILE
    end_token_ids: frozenset[int] = frozenset()

    def with_system_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """`messages`, after the profile's system prompt if they have none of their own."""
        prompt = self.profile.system_prompt
        if prompt is None or any(message.get("role") in _SYSTEM_ROLES for message in messages):
            return list(messages)
        return [{"role": "system", "content": prompt}, *messages]


def read_brought(folder: Path, base: Tokenizer, identity: TokenizerIdentity, num_rows: int) -> Brought:
    """Read and check the text files of `folder`, but for the template's running. Raises AdapterInvalid."""
    change = read_change(folder, base, identity, num_rows)
    notes = list(change.notes)
    template = change.template
    data = _read(folder, CHAT_TEMPLATE)
    if data is not None:
        try:
            own = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise AdapterInvalid(
                f"{CHAT_TEMPLATE.name} is not UTF-8 text (byte {error.start}). Save it as UTF-8.", param="chat_template"
            ) from error
        if template is not None and template != own:
            notes.append("chat_template.jinja is used, and not the chat_template of tokenizer_config.json")
        template = own
    data = _read(folder, PROFILE)
    if change.unneeded:
        notes.append(f"left out, since the base's tokenizer says the same: {', '.join(change.unneeded)}")
    return Brought(
        template=template,
        change=change,
        profile=None if data is None else ServingProfile.from_bytes(data),
        unneeded=change.unneeded,
        notes=tuple(notes),
    )


def _read(folder: Path, file: AdapterFile) -> bytes | None:
    limit = file.max_bytes or 0
    try:
        with open(folder / file.name, "rb") as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AdapterInvalid(f"{file.name} cannot be read: {error}. Check the file.", param=file.part) from error
    if len(data) > limit:
        raise AdapterInvalid(f"{file.name} has more than {limit} bytes. Send a smaller one.", param=file.part)
    return data
