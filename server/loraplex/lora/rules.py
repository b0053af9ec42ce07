"""ModuleRules: the modules of a base that a config selects, their ranks and scalings, exactly as PEFT.

selected = not excluded, not in a saved module, and named (list: the whole name or its tail after a "."; string: a
           regular expression for the whole name), and for tails also in one of layers_to_transform
saved    = it, or a module that holds it, has a name that ends with an entry of modules_to_save
scaling  = alpha / r, or alpha / sqrt(r) with rsLoRA
"""

import math
import re

from loraplex.errors import AdapterInvalid
from loraplex.lora.patterns import MAX_EXPRESSIONS, MatchClock, PatternTable, compile_expression
from loraplex.lora.peft import ALL_LINEAR, PeftConfig

# The first number between two dots that has a list's name before it: model.layers.<10>.mlp
_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
# "all-linear" leaves the output embedding out; transformers' causal models call it one of these.
_OUTPUT_EMBEDDINGS = frozenset({"lm_head", "embed_out"})
# PEFT's EMBEDDING_LAYER_NAMES: ensure_weight_tying acts when one of these is named.
_TIED_NAMES = frozenset({"embed_tokens", "lm_head"})


class ModuleRules:
    """The compiled rules of one config. Their expressions share one time limit: make one for each plan."""

    def __init__(self, config: PeftConfig):
        self._config = config
        self._clock = MatchClock()
        self._targets = _Selection(config.target_modules, "target_modules", self._clock)
        self._excluded = _Selection(config.exclude_modules, "exclude_modules", self._clock)
        self._ranks = PatternTable(config.rank_pattern, "rank_pattern", self._clock)
        self._alphas = PatternTable(config.alpha_pattern, "alpha_pattern", self._clock)
        self._saved = config.modules_to_save
        # PEFT reads these names as expressions there; their signs are letters, digits, "_" and ".", which is any sign
        self._inside_saved = re.compile(rf"(^|.*\.)({'|'.join(self._saved)})($|\..*)") if self._saved else None
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
        if self._excluded.matches(name) or (self._inside_saved is not None and self._inside_saved.match(name)):
            return False
        if self._config.target_modules == ALL_LINEAR:
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
        return bool(self._saved) and any(path.endswith(self._saved) for path in holders(name))

    def saved_within(self, name: str) -> list[str]:
        """The modules that hold `name` and `name` itself, as far as modules_to_save names them."""
        return [path for path in holders(name) if self._saved and path.endswith(self._saved)]

    @property
    def ties_saved(self) -> bool:
        """Whether PEFT saves a head that shares the embedding's weight together with the embedding."""
        named = any(entry.rpartition(".")[2] in _TIED_NAMES for entry in self._saved)
        return self._config.ensure_weight_tying and named

    @property
    def ties_lora(self) -> bool:
        """Whether PEFT puts the embedding's LoRA, transposed, on a head that shares its weight."""
        return self._config.ensure_weight_tying and not self.ties_saved and self._targets.names_last(_TIED_NAMES)

    def rank_of(self, *names: str) -> int:
        """The rank of the LoRA on the module (or the parameter) of these names: the first that a pattern has counts."""
        found = (self._ranks.get(name, None) for name in names)
        return next((rank for rank in found if rank is not None), self._config.r)

    def scaling_of(self, *names: str) -> float:
        """What B·A of the module of these names is multiplied by."""
        found = (self._alphas.get(name, None) for name in names)
        alpha = next((alpha for alpha in found if alpha is not None), self._config.lora_alpha)
        rank = self.rank_of(*names)
        return alpha / math.sqrt(rank) if self._config.use_rslora else alpha / rank

    def ambiguous_alpha(self, name: str) -> list[str]:
        """The keys of alpha_pattern without signs that name the module with different values; the first one counts."""
        return self._alphas.ambiguous(name)

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

    def names_last(self, last: frozenset[str]) -> bool:
        """Whether an entry's last part, or what the expression matches, is one of `last`."""
        if self._expression is not None:
            return any(self._clock.match(self._expression, name, whole=True) for name in sorted(last))
        return any(name.rpartition(".")[2] in last for name in self._names)


def holders(name: str) -> list[str]:
    """The modules that hold `name`, and `name` itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _tails(name: str) -> list[str]:
    """`name` itself and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
