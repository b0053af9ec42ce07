"""The files of an adapter: a closed list.

Two are its arithmetic and must be there; the others are its text side and may be. Whatever else lies in a trainer's
folder (README.md, optimizer.pt, checkpoints, …) is left alone.
"""

from dataclasses import dataclass

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """`part` names it in an upload's form. `max_bytes` None: the store's limit for weights."""

    name: str
    part: str
    max_bytes: int | None


CONFIG = AdapterFile("adapter_config.json", "config", MAX_CONFIG_BYTES)
WEIGHTS = AdapterFile("adapter_model.safetensors", "weights", None)
CHAT_TEMPLATE = AdapterFile("chat_template.jinja", "chat_template", 256 << 10)
TOKENIZER = AdapterFile("tokenizer.json", "tokenizer", 64 << 20)
TOKENIZER_CONFIG = AdapterFile("tokenizer_config.json", "tokenizer_config", 1 << 20)
SPECIAL_TOKENS_MAP = AdapterFile("special_tokens_map.json", "special_tokens_map", 256 << 10)
ADDED_TOKENS = AdapterFile("added_tokens.json", "added_tokens", 1 << 20)
PROFILE = AdapterFile("serving_profile.json", "profile", 64 << 10)

REQUIRED = (CONFIG, WEIGHTS)
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
TEXT_FILES = (CHAT_TEMPLATE, *TOKENIZER_FILES, PROFILE)
"""Those that need not be there, in the order in which the digest takes them."""
FILES = (*REQUIRED, *TEXT_FILES)
