"""Dialect: how a request for tokens is written for a server, and what it takes beyond the oldest of OpenAI's fields."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Dialect:
    """lora_ids   of a server that takes adapters by number in the field `lora` (llama.cpp's): the number by name. Any
                  other name is the base. None: `model` names the adapter
    extra      fields that go with every request
    """

    is_chat: bool = False
    ignore_eos: bool = True
    include_usage: bool = True
    lora_ids: Mapping[str, int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, model: str, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0.0, "stream": True}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.include_usage:
            body["stream_options"] = {"include_usage": True}
        if self.lora_ids:
            body["lora"] = [self._lora(model, self.lora_ids)]
        return {**body, **self.extra}

    @staticmethod
    def _lora(model: str, lora_ids: Mapping[str, int]) -> dict[str, Any]:
        """The base is an adapter at scale 0: llama.cpp applies every adapter it has loaded to a request that names none
        (its issue 28674)."""
        number = lora_ids.get(model)
        return {"id": 0, "scale": 0.0} if number is None else {"id": number, "scale": 1.0}

    def lesser(self) -> Iterator["Dialect"]:
        """This one, and then with less and less of the newer fields."""
        yield self
        yield replace(self, ignore_eos=False)
        yield replace(self, ignore_eos=False, include_usage=False)
