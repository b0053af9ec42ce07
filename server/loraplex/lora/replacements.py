"""Replacements: what PEFT trains beside the LoRA: whole modules, rows of the embedding, biases.

modules_to_save           a module whose name, or that of one that holds it, ends with an entry: every parameter
trainable_token_indices   rows of the input embedding; of the head, too, where it shares the embedding's weight
bias                      "all": every bias; "lora_only": those of the modules with a LoRA
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace

from loraplex.errors import AdapterInvalid
from loraplex.lora.headers import SafetensorsHeader
from loraplex.lora.keys import FileKeys
from loraplex.lora.module_plan import ModulePlan, ReplacedPlan
from loraplex.lora.peft import PeftConfig
from loraplex.lora.rules import ModuleRules, holders
from loraplex.lora.text import listed, shown
from loraplex.lora.weights import ModuleShape


class Replacements:
    """Uses up the keys of a file that are no LoRA. `modules`: the plan's, with the trained biases once resolved."""

    def __init__(
        self,
        config: PeftConfig,
        rules: ModuleRules,
        keys: FileKeys,
        header: SafetensorsHeader,
        targets: Mapping[str, ModuleShape],
        modules: Mapping[str, ModulePlan],
    ):
        self.modules = dict(modules)
        self.replaced: list[ReplacedPlan] = []
        self.copies: dict[str, str] = {}
        self.twins: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._config = config
        self._rules = rules
        self._keys = keys
        self._plain = dict(keys.plain)
        self._base_layers = dict(keys.base_layers)
        self._tokens = dict(keys.tokens)
        self._tensors = header.tensors
        self._targets = targets

    def resolve(self) -> None:
        """Find a place for every key, or raise AdapterInvalid."""
        saved = self._save_modules()
        self._replace_rows(saved)
        self._train_biases(saved)
        self._compare_biases(saved)
        self._compare_copies()
        for path, key in (self._plain | self._base_layers | self._tokens).items():
            raise _refused(self._why_left(path, key))

    def _save_modules(self) -> set[str]:
        saved = {name for name, shape in self._targets.items() if self._rules.saves(name)}
        heads = {name for name, shape in self._targets.items() if shape.is_tied}
        embeddings = {name for name, shape in self._targets.items() if shape.kind == "embedding"}
        if heads and self._rules.ties_saved:
            # PEFT saves both the embedding and the head that shares its weight, whichever is named
            saved |= heads | embeddings
            keys = [
                key for name in sorted(heads | embeddings) if (key := self._plain.get(f"{name}.weight")) is not None
            ]
            self.twins += itertools.pairwise(keys)
        elif self._config.ensure_weight_tying and embeddings <= saved:
            saved |= {name for name in heads if f"{name}.weight" in self._plain}
        for name in self._targets:  # in the base's order
            if name not in saved:
                continue
            shape = self._targets[name]
            if shape.kind == "experts":
                raise _refused(
                    f"modules_to_save names {shown(name, 160)}: whole stacks of experts are not served. Use "
                    "target_parameters for them."
                )
            if name in self.modules:
                raise _refused(
                    f"{shown(name, 160)} is in modules_to_save and has a LoRA too. Train it with one of them."
                )
            if len(paths := self._rules.saved_within(name)) > 1:
                raise _refused(
                    f"modules_to_save names {shown(paths[-1], 160)} (by the end of its name) and "
                    f"{shown(paths[0], 160)}, which holds it: PEFT writes an untrained copy of the one over the other, "
                    "and cannot read the file itself. Name one of them, as a whole, and train it again."
                )
            for parameter, size in shape.parameters.items():
                key = self._plain.pop(f"{name}.{parameter}", None)
                if key is None:
                    raise _refused(
                        f"adapter_config.json saves {shown(name, 160)} (by modules_to_save or ensure_weight_tying), "
                        f"and the file lacks its {parameter}. Send the config and the weights of one save_pretrained."
                    )
                self._check_size(key, size, shape)
                if parameter == "bias" and shape.kind != "leaf":
                    self.modules[name] = ModulePlan(shape, 0, 0.0, trained_bias=key)
                else:
                    self.replaced.append(ReplacedPlan(shape, parameter, key, size))
        paths = {path for name in self._targets for path in holders(name)}
        for entry in self._config.modules_to_save:
            if not any(path.endswith(entry) for path in paths):
                self.notes.append(f"modules_to_save names {shown(entry)}, which no module of this base has")
        return saved

    def _replace_rows(self, saved: set[str]) -> None:
        tables = self._token_tables()
        for name, indices in tables.items():
            shape, key = self._targets[name], self._tokens.pop(name, None)
            if key is None:
                raise _refused(
                    f"adapter_config.json trains rows of {shown(name, 160)} (trainable_token_indices), and the file "
                    "has none. Send the config and the weights of one save_pretrained."
                )
            heads = [head for head in self._targets.values() if head.is_tied and head.name not in tables]
            for one in (shape, *(heads if shape.kind == "embedding" else ())):
                self._replace_rows_of(one, key, indices, saved)

    def _token_tables(self) -> dict[str, tuple[int, ...]]:
        """Token ids by the module whose rows they are; of a head that PEFT ties to the embedding, none."""
        tables: dict[str, tuple[int, ...]] = {}
        for entry, indices in self._config.token_indices.items():
            if entry:
                names = [name for name in self._targets if name.endswith(entry)]
            else:
                names = [name for name, shape in self._targets.items() if shape.kind == "embedding"]
            if not names or any(self._targets[name].kind not in ("embedding", "head") for name in names):
                raise AdapterInvalid(
                    f"trainable_token_indices names {shown(entry or 'the embedding')}, which is neither the input "
                    "embedding nor the output head of this base. Check that the adapter was trained on this base.",
                    param="config",
                )
            tables |= dict.fromkeys(names, indices)
        of_embeddings = [ids for name, ids in tables.items() if self._targets[name].kind == "embedding"]
        for name in list(tables):
            if self._targets[name].is_tied and of_embeddings and tables[name] == of_embeddings[0]:
                del tables[name]
        return tables

    def _replace_rows_of(self, shape: ModuleShape, key: str, indices: tuple[int, ...], saved: set[str]) -> None:
        vocabulary, features = (
            (shape.in_features, shape.out_features)
            if shape.kind == "embedding"
            else (shape.out_features, shape.in_features)
        )
        if max(indices) >= vocabulary:
            raise AdapterInvalid(
                f"trainable_token_indices names the token {max(indices)}, and this base has {vocabulary}: the adapter "
                "enlarges the vocabulary, which a base shared by all adapters cannot. Serve it merged into its own "
                "base, or train it with tokens that the base has.",
                param="config",
            )
        if shape.name in saved or shape.name in self.modules or "bias" in shape.parameters:
            raise _refused(
                f"{shown(shape.name, 160)} has rows of its own (trainable_token_indices; a head that shares the "
                "embedding's weight has them too) beside a LoRA, modules_to_save or a bias: PEFT itself computes no "
                "such thing faithfully. Train it with one of them."
            )
        size = (len(indices), features)
        self._check_size(key, size, shape)
        self.replaced.append(ReplacedPlan(shape, "weight", key, size, indices))

    def _train_biases(self, saved: set[str]) -> None:
        if self._config.bias == "none":
            return
        for name, shape in self._targets.items():
            if name in saved or "bias" not in shape.parameters:
                continue
            has_lora = name in self.modules
            if not has_lora and self._config.bias != "all":
                continue
            key = (self._base_layers if has_lora else self._plain).pop(f"{name}.bias", None)
            if key is None:
                raise _refused(
                    f"adapter_config.json says bias={self._config.bias!r}, and the file lacks the bias of "
                    f"{shown(name, 160)}. (PEFT before 0.21 trained the biases of 'lora_only' and left them out of the "
                    "file.) Save the adapter again with its biases."
                )
            self._check_size(key, shape.parameters["bias"], shape)
            if shape.kind == "leaf":
                self.replaced.append(ReplacedPlan(shape, "bias", key, shape.parameters["bias"]))
            else:
                self.modules[name] = replace(self.modules.get(name) or ModulePlan(shape, 0, 0.0), trained_bias=key)

    def _compare_biases(self, saved: set[str]) -> None:
        """Biases that no adapter can change here (a router's buffer, the experts'): the file may hold the base's. And
        those that PEFT writes from inside its wrapper of a saved module: the base's, and the trained ones once more."""
        is_all = self._config.bias == "all"
        for path in [path for path in self._plain if "bias" in path.rpartition(".")[2]]:
            outer, mark, inner = path.partition(".original_module.")
            if not mark:
                outer, mark, inner = path.partition(".modules_to_save.")
                inner = inner.partition(".")[2] or inner  # past the adapter's name, which a module without others lacks
            own = f"{outer}.{inner}" if mark else path
            is_saved = own.rpartition(".")[0] in saved
            if is_saved and is_all and mark == ".modules_to_save.":
                self.twins.append((self._keys.plain[own], self._plain.pop(path)))
            elif (is_saved and is_all) or (not mark and (is_saved or is_all)):
                self.copies[own] = self._plain.pop(path)

    def _compare_copies(self) -> None:
        """PEFT writes the base's own tensor beside a LoRA on an embedding or a head, or when save_embedding_layers says
        so."""
        for path in list(self._plain):
            name, _, parameter = path.rpartition(".")
            shape = self._targets.get(name)
            if shape is not None and shape.kind in ("embedding", "head") and parameter == "weight":
                key = self._plain.pop(path)
                self._check_size(key, shape.parameters[parameter], shape)
                self.copies[path] = key
        for path in list(self._base_layers):
            name, _, parameter = path.rpartition(".")
            shape = self._targets.get(name)
            if shape is not None and shape.kind in ("embedding", "head") and parameter in shape.parameters:
                key = self._base_layers.pop(path)
                self._check_size(key, shape.parameters[parameter], shape)
                self.copies[path] = key

    def _check_size(self, key: str, expected: tuple[int, ...], shape: ModuleShape) -> None:
        found = self._tensors[key].shape
        if found == expected:
            return
        if shape.kind in ("embedding", "head") and len(found) == len(expected) and found[1:] == expected[1:]:
            raise _refused(
                f"The tensor {shown(key, 160)} has {found[0]} rows, and this base's has {expected[0]}: the adapter was "
                "trained on another vocabulary (or enlarged it), which a base shared by all adapters cannot follow. "
                "Serve it merged into its own base, or train it on the base's vocabulary."
            )
        raise _refused(
            f"The tensor {shown(key, 160)} has the shape {list(found)}, and this base needs {list(expected)}. Check "
            "that the adapter was trained on this base."
        )

    def _why_left(self, path: str, key: str) -> str:
        name, _, parameter = path.rpartition(".")
        shape = self._targets.get(name)
        if key in self._tokens.values():
            field = "trainable_token_indices"
        elif parameter == "bias" and shape is not None:
            field = "bias or modules_to_save"
        elif shape is not None and parameter in shape.parameters:
            field = "modules_to_save"
        else:
            names = [one for one, each in self._targets.items() if each.kind != "experts"]
            return (
                f"The tensor {shown(key, 160)} is for {shown(path, 160)}, which an adapter cannot change on this base. "
                f"What it can change are the modules {listed(names)}. Check that the adapter was trained on this base, "
                "or train it without this tensor."
            )
        return (
            f"The tensor {shown(key, 160)} is there, and adapter_config.json does not name it in {field}. Send the "
            "config and the weights of one save_pretrained."
        )


def _refused(message: str) -> AdapterInvalid:
    return AdapterInvalid(message, param="weights")
