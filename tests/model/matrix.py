"""The README's matrix: every architecture with every shape of adapter. `make matrix` rewrites it.

A cell is "=" when a mixed batch gave what PEFT gives, "–" when the base has nothing that such an adapter could change,
"PEFT" when PEFT itself cannot make or run it, and "refused" when this server refuses it.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from adapter_shapes import SHAPES, TOKENS, NoSuchShape, write_with_peft
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny
from architectures import SERVED
from harness import Driver, World, make_world_of, random_ids, request
from loraplex.errors import AdapterInvalid
from loraplex.lora.reader import AdapterReader
from loraplex.lora.store import AdapterStore

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"


def build(name: str, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of the row `name`; `overrides` are fields of its config."""
    model_type, config, _ = SERVED[name]
    config = config | overrides
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some configs warn about defaults that a tiny model does not meet
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
    return tiny.sharpen(model)


def run_row(name: str, folder: Path) -> str:
    """The row of the table. The proof at load passes (make_world_of runs it), and one mixed batch of all adapters and
    the base is compared with PEFT at every position; AssertionError where it differs."""
    world: World = make_world_of(build(name), SERVED[name][0])
    cells: dict[str, str] = {}
    peers: dict[str, tuple[nn.Module, str]] = {}
    with AdapterStore(folder / "store") as store:
        base = world.base
        reader = AdapterReader(store.blobs, base.targets, torch.float32, 64, base.tensor_of, base.fingerprint)
        for seed, shape in enumerate(SHAPES):
            source = folder / str(seed)
            try:
                peer = write_with_peft(shape, world.reference, base.targets, source, seed)  # type: ignore[arg-type]
                with store.import_folder(source) as staging:
                    checked = reader.check(staging.folder)
                    digest = store.commit(staging)
            except NoSuchShape as reason:
                cells[shape.name] = "PEFT" if str(reason).startswith("PEFT") else "–"
                continue
            except AdapterInvalid:
                cells[shape.name] = "refused"
                continue
            weights = reader.read(digest)
            assert weights.slab.numel() == checked.facts.num_values == checked.plan.numel
            world.adapters[digest] = weights
            peers[shape.name] = (peer, digest)
            cells[shape.name] = "="
    _compare(world, peers)
    return "| " + " | ".join([name, SERVED[name][2], *(cells[shape.name] for shape in SHAPES)]) + " |"


def _compare(world: World, peers: dict[str, tuple[nn.Module, str]]) -> None:
    columns = [None, *peers]
    prompts = [random_ids(20 + 3 * i % 17, seed=i) for i in range(len(columns))]
    for prompt in prompts:
        prompt[3 : 3 + len(TOKENS)] = TOKENS
    with world.engine(max_num_batched_tokens=40) as engine:
        driver = Driver(engine)
        for i, column in enumerate(columns):
            use = world.use(None if column is None else peers[column][1])
            driver.add(request(str(i), prompts[i], use, max_tokens=3, prompt_logprobs=0))
        outcomes = driver.run()
        recorded = world.runner.recorded
    answers = []
    for i, column in enumerate(columns):
        token_ids = [*prompts[i], *outcomes[str(i)].tokens]
        with torch.inference_mode():
            peer = world.reference if column is None else peers[column][0]
            expected = peer(torch.tensor([token_ids])).logits[0]
            answers.append(peer(torch.tensor([prompts[0]])).logits[0])
        assert len(recorded[str(i)]) == len(token_ids) - 1
        spread = expected.max() - expected.min()
        for position, row in recorded[str(i)].items():
            assert (row - expected[position]).abs().max() <= TOLERANCE * spread, (column, position)
    for i, answer in enumerate(answers):  # equality would also hold if nothing had any effect
        for other in answers[:i]:
            assert (answer - other).abs().max() > 100 * TOLERANCE * (answer.max() - answer.min()), columns[i]


def head() -> str:
    """The table's first two lines."""
    names = ["architecture", "what it shows", *(shape.name for shape in SHAPES)]
    return "| " + " | ".join(names) + " |\n|---|---|" + ":-:|" * len(SHAPES)


def table_in(readme: str) -> str:
    """What stands between the markers."""
    return readme.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    readme = ROOT / "README.md"
    rows = [head()]
    for name in SERVED:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_row(name, Path(folder)))
        sys.stdout.write(rows[-1] + "\n")
    text = readme.read_text(encoding="utf-8")
    table = "\n".join(rows)
    readme.write_text(text.replace(f"{BEGIN}\n{table_in(text)}\n{END}", f"{BEGIN}\n{table}\n{END}"), encoding="utf-8")


if __name__ == "__main__":
    main()
