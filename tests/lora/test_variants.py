"""Good adapters: what PEFT writes is accepted, and in mixed batches answers as PEFT's own model does."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from variants import GOOD, TOKENS, Variant, make_base, set_fields, write_variant

from harness import Driver, World, make_world_of, random_ids, request
from loraplex.lora.digest import CONFIG_NAME
from loraplex.lora.parents import is_additive
from loraplex.lora.reader import AdapterReader, Checked
from loraplex.lora.report import BaseFacts, report_on
from loraplex.lora.store import AdapterStore

TOLERANCE = 1e-4
MAX_RANK = 128


@dataclass
class Room:
    """One base, its variants in store and in PEFT."""

    world: World
    folder: Path
    peers: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)

    def reader(self, root: Path) -> AdapterReader:
        base = self.world.base
        return AdapterReader(root, base.targets, torch.float32, MAX_RANK, base.tensor_of, base.fingerprint)

    def report(self, checked: Checked) -> dict[str, Any]:
        facts = {"dtype": checked.dtype, "compute_dtype": "float32", "value_bytes": 4, "disk_bytes": checked.nbytes}
        base = BaseFacts(self.world.model_type, self.world.base.vocab_size)
        targets = self.world.base.targets
        return report_on(checked.config, checked.plan, targets, base, on_device=False, notes=(), **facts).to_json()

    def add(self, variant: Variant, seed: int) -> None:
        source = self.folder / str(seed)
        peer = write_variant(variant, self.world.reference, source, seed)  # type: ignore[arg-type]
        with AdapterStore(self.folder / "store") as store:
            reader = self.reader(store.blobs)
            with store.import_folder(source) as staging:
                checked = reader.check(staging.folder)
                digest = store.commit(staging)
            weights = reader.read(digest)
        assert checked.facts.num_values == checked.plan.numel == weights.slab.numel()
        assert not checked.plan.notes
        assert is_additive(self.report(checked)) == weights.is_additive, variant.name
        self.world.adapters[digest] = weights
        self.peers[variant.name] = (peer, digest)

    def run(self, names: list[str | None]) -> tuple[dict[str, list[int]], dict[str, dict[int, torch.Tensor]]]:
        """Tokens (prompt and answer) and logits of one request of each adapter (None: the base), in one batch."""
        prompts = {}
        with self.world.engine(max_num_batched_tokens=40) as engine:
            driver = Driver(engine)
            for name in names:
                seed = [None, *self.peers].index(name)
                prompt = random_ids(20 + 3 * seed % 17, seed=seed)
                prompt[3 : 3 + len(TOKENS)] = TOKENS
                prompts[str(name)] = prompt
                use = self.world.use(None if name is None else self.peers[name][1])
                driver.add(request(str(name), prompt, use, max_tokens=3, prompt_logprobs=0))
            outcomes = driver.run()
            recorded = self.world.runner.recorded
        return {name: [*prompt, *outcomes[name].tokens] for name, prompt in prompts.items()}, recorded


@pytest.fixture(scope="module", params=GOOD)
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    """All good variants of one base."""
    world = make_world_of(make_base(request.param), request.param)
    room = Room(world, tmp_path_factory.mktemp("variants"))
    for seed, variant in enumerate(GOOD[request.param]):
        room.add(variant, seed)
    return room


def test_there_are_enough():
    assert sum(map(len, GOOD.values())) >= 100


@torch.inference_mode()
def test_a_mixed_batch_answers_as_peft(room: Room):
    token_ids, recorded = room.run([None, *room.peers])
    for name, (peer, _) in room.peers.items():
        tokens = torch.tensor([token_ids[name]])
        expected = peer(tokens).logits[0]
        spread = expected.max() - expected.min()
        # equality would also hold if nothing had any effect
        assert (expected - room.world.reference(tokens).logits[0]).abs().max() > 100 * TOLERANCE * spread, name
        assert len(recorded[name]) == len(token_ids[name]) - 1
        for position, row in recorded[name].items():
            assert (row - expected[position]).abs().max() <= TOLERANCE * spread, (name, position)


def test_no_neighbour_changes_a_bit(room: Room):
    """Adapters that bring biases, modules and rows of their own beside plain ones and the base."""
    names = [None, *room.peers]
    _, together = room.run(names)
    for name in names:
        _, alone = room.run([name])
        for position, row in alone[str(name)].items():
            beside = together[str(name)][position]
            if room.world.is_batch_invariant:
                assert torch.equal(row, beside), (name, position)
            else:
                assert (row - beside).abs().max() <= TOLERANCE * (row.max() - row.min()), (name, position)


def test_the_order_of_fields_and_tensors_is_nothing(room: Room):
    for seed, name in enumerate(room.peers):
        source, other = room.folder / str(seed), room.folder / f"{seed}-reversed"
        shutil.copytree(source, other)
        config = json.loads((source / CONFIG_NAME).read_text())
        reversed_lists = {
            key: config[key][::-1]
            for key in ("target_modules", "target_parameters", "modules_to_save")
            if isinstance(config.get(key), list)
        }
        (other / CONFIG_NAME).write_text(json.dumps(dict(reversed(config.items()))))
        set_fields(other, **reversed_lists)
        reader = room.reader(room.folder)
        assert torch.equal(reader.check(source).weights.slab, reader.check(other).weights.slab), name
