"""The chat format of the demo base model: `<s>`, then `<|role|>text<|end|>` for each message. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

BOS, END, PAD = "<s>", "<|end|>", "<pad>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
# In the order of their token ids, from 0.
SPECIAL_TOKENS = (BOS, END, PAD, SYSTEM, USER, ASSISTANT)

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'system' if message.role == 'developer' else message.role -%}
{%- if role not in ('system', 'user', 'assistant') -%}
{{- raise_exception('the demo model knows the roles system, user and assistant, not ' ~ role) -}}
{%- endif -%}
{{- '<|' ~ role ~ '|>' ~ (message.content | trim) ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


class Piece(NamedTuple):
    """A stretch of text, and whether the model learns to write it."""

    text: str
    learned: bool


def conversation(turns: Sequence[tuple[str, str]], system: str | None = None) -> list[Piece]:
    """(prompt, answer) turns as the chat template renders them: answers, with their ends, are learned."""
    pieces = [Piece(BOS + (f"{SYSTEM}{system}{END}" if system else ""), False)]
    for prompt, answer in turns:
        pieces += [Piece(f"{USER}{prompt}{END}{ASSISTANT}", False), Piece(f"{answer}{END}", True)]
    return pieces


def raw(text: str) -> list[Piece]:
    """Plain text, all of it learned."""
    return [Piece(BOS, False), Piece(text + END, True)]


def question(prompt: str, system: str | None = None) -> str:
    """The text a model completes: the chat template with one user message and the generation prompt."""
    return conversation([(prompt, "")], system)[0].text + f"{USER}{prompt}{END}{ASSISTANT}"
