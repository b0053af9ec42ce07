"""ModuleRules: the modules of a base that a config selects, their ranks and scalings, exactly as PEFT.

selected = not excluded, not in a saved module, and named (list: the whole name or its tail after a "."; string: a
           regular expression for the whole name), and for tails also in one of layers_to_transform
saved    = it, or a module that holds it, has a name that ends with an entry of modules_to_save
scaling  = alpha / r, or alpha / sqrt(r) with rsLoRA
"""

import math
import re
from typing import TYPE_CHECKING

from loraplex.errors import AdapterInvalid
from loraplex.lora.patterns import MAX_EXPRESSIONS, MatchClock, PatternTable, compile_expression

if TYPE_CHECKING:
    from loraplex.lora.peft import PeftConfig

# The first number between two dots that has a list's name before it: model.layers.<10>.mlp
_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
# "all-linear" leaves the output embedding out; transformers' causal models call it one of these.
_OUTPUT_EMBEDDINGS = frozenset({"lm_head", "embed_out"})


class ModuleRules:
    """The compiled rules of one config. Their expressions share one time limit: make one for each plan."""

    def __init__(self, config: "PeftConfig"):
        self._config = config
        self._clock = MatchClock()
        self._targets = _Selection(config.target_modules, "target_modules", self._clock)
        self._excluded = _Selection(config.exclude_modules, "exclude_modules", self._clock)
        self._ranks = PatternTable(config.rank_pattern, "rank_pattern", self._clock)
        self._alphas = PatternTable(config.alpha_pattern, "alpha_pattern", self._clock)
        self._saved = config.modules_to_save
        self._parameters = frozenset(config.target_parameters)
        self._layers = frozenset(config.layers_to_transform or ())
        if len(config.layers_pattern) > MAX_EXPRESSIONS:
            raise AdapterInvalid(
                f"layers_pattern in adapter_config.json holds more than {MAX_EXPRESSIONS} expressions. "
                "Name the list of layers once, for instance 'layers'.",
                param="config",
            )
        self._layer_patterns = [
            compile_expression(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "layers_pattern")
            for pattern in config.layers_pattern
        ]

    def selects(self, name: str) -> bool:
        """Whether the config puts a LoRA on the module `name`."""
        if self._excluded.matches(name) or any(f".{saved}." in f".{name}." for saved in self._saved):
            return False
        if self._config.target_modules == "all-linear":
            return name.rpartition(".")[2] not in _OUTPUT_EMBEDDINGS
        if not self._targets.matches(name):
            return False
        # PEFT lets a whole name in a list win over layers_to_transform
        return not self._layers or self._targets.names_whole(name) or self._layer_of(name) in self._layers

    def selects_parameter(self, path: str) -> bool:
        """Whether target_parameters names the parameter `path`; layers and exclusions have no say there."""
        return bool(self._parameters) and any(tail in self._parameters for tail in _tails(path))

    def saves(self, name: str) -> bool:
        """Whether the config saves the module `name` whole."""
        if not self._saved:
            return False
        parts = name.split(".")
        return any(".".join(parts[:end]).endswith(self._saved) for end in range(1, len(parts) + 1))

    def rank_of(self, name: str) -> int:
        """The rank of the LoRA on the module (or the parameter) `name`."""
        return self._ranks.get(name, self._config.r)

    def scaling_of(self, name: str) -> float:
        """What B·A of `name` is multiplied by."""
        rank, alpha = self.rank_of(name), self._alphas.get(name, self._config.lora_alpha)
        return alpha / math.sqrt(rank) if self._config.use_rslora else alpha / rank

    def unmatched(self, names: list[str]) -> list[str]:
        """The entries of a target_modules list that are the name or tail of none of `names`."""
        if isinstance(self._config.target_modules, str):
            return []
        last = {name.rpartition(".")[2] for name in names}
        missing = [target for target in self._config.target_modules if target not in last]
        # most lists hold last parts only, and a load should not wait for the tails of every name
        tails = {tail for name in names for tail in _tails(name)} if missing else set()
        return [target for target in missing if target not in tails]

    def _layer_of(self, name: str) -> int | None:
        if not self._layer_patterns:
            found = _LAYER.match(name)
        else:
            tries = (self._clock.match(pattern, name) for pattern in self._layer_patterns)
            found = next((match for match in tries if match), None)
        return int(found["idx"]) if found else None


class _Selection:
    """`target_modules` or `exclude_modules`: names, or one regular expression for the whole name."""

    def __init__(self, names: tuple[str, ...] | str, field: str, clock: MatchClock):
        self._names = frozenset() if isinstance(names, str) else frozenset(names)
        self._clock = clock
        self._expression = compile_expression(names, field) if isinstance(names, str) else None

    def matches(self, name: str) -> bool:
        if self._expression is not None:
            return bool(self._clock.match(self._expression, name, whole=True))
        return bool(self._names) and any(tail in self._names for tail in _tails(name))

    def names_whole(self, name: str) -> bool:
        return name in self._names


def _tails(name: str) -> list[str]:
    """`name` itself and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
