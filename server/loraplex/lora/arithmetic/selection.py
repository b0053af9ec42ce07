"""selection: what adapter_config.json must say so that exactly these modules have a LoRA."""

from collections.abc import Collection, Mapping

from loraplex.lora.arithmetic.source import Source
from loraplex.lora.rules import holders
from loraplex.lora.weights import ModuleShape


def selection(
    shapes: Mapping[str, ModuleShape], targets: Collection[str] | None, whole: Collection[str] = ()
) -> dict[str, list[str]]:
    """target_modules and target_parameters for `shapes`. `targets`: all modules of the base, None where it is not
    known. A last part of names ("q_proj") stands for them where no other module has it, or where it is in `whole`."""
    parameters = [name for name, shape in shapes.items() if shape.kind == "experts"]
    parameters += [f"{name}.weight" for name, shape in shapes.items() if shape.kind == "leaf"]
    modules = [name for name, shape in shapes.items() if shape.kind not in ("experts", "leaf")]
    others = None if targets is None else {_last(name) for name in targets if name not in set(modules)}
    entries = []
    for name in modules:
        is_whole = _last(name) in whole if others is None else _last(name) not in others
        entries.append(_last(name) if is_whole else name)
    unique = list(dict.fromkeys(entries))
    return {"target_modules": unique, **({"target_parameters": parameters} if parameters else {})}


def selected_whole(source: Source) -> set[str]:
    """The last parts of names that the source's config selects wherever they stand, by PEFT's rules."""
    config = source.config
    is_narrowed = config.layers_to_transform is not None or config.exclude_modules or config.modules_to_save
    return set() if is_narrowed or isinstance(config.target_modules, str) else set(config.target_modules)


def saved_entries(modules: Collection[str], targets: Collection[str]) -> list[str]:
    """modules_to_save for exactly these modules: PEFT takes every module whose path ends with an entry's letters."""
    paths = {path for name in targets for path in holders(name)}
    entries = []
    for name in modules:
        is_whole = all(path in set(modules) for path in paths if path.endswith(_last(name)))
        entries.append(_last(name) if is_whole else name)
    return list(dict.fromkeys(entries))


def _last(name: str) -> str:
    return name.rpartition(".")[2]
