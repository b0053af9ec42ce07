"""Sums of adapters in mixed batches: PEFT's `add_weighted_adapter`, the oracle, and the request alone.

PEFT's "cat" is the sum of the deltas, sum_i c_i B_i A_i with c = weight * scaling, and so is a composition. PEFT's
"linear" sums A and B apart:

    (sum_i sqrt(c_i) B_i) (sum_j sqrt(c_j) A_j) = sum_i c_i B_i A_i + sum_{i != j} sqrt(c_i c_j) B_i A_j

It is the sum of the deltas exactly where the second term, of one adapter's B with another's A, is nothing.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from test_peft_parity import TOLERANCE, with_adapters
from torch import Tensor

from harness import Driver, World, make_world, random_ids, request
from loraplex.engine.messages import Composition
from loraplex.lora.reader import AdapterReader
from loraplex.lora.store import AdapterStore
from oracle import Oracle

Weights = Mapping[str, float]

PROMPT = random_ids(37, seed=5)


def shapes(model_type: str) -> dict[str, dict]:
    """`one`, `two` and `three` overlap in their modules and have one rank; `high` and `low` share a module, in which
    `halved` gives each its own half of the rank; `up` and `down` share none."""
    attention, first, second = ("q_proj", "up_proj", "down_proj")
    others: dict = {}
    if model_type == "gpt2":
        attention, first, second = ("c_attn", "c_fc", "mlp.c_proj")
        others = {"fan_in_fan_out": True}
    both = [attention, first]
    return {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": both, **others},
        "two": {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": both, **others},
        "three": {"r": 4, "target_modules": [first], **others},
        "wide": {"r": 7, "lora_alpha": 5, "target_modules": [second], **others},
        "high": {"r": 6, "target_modules": [attention], **others},
        "low": {"r": 6, "lora_alpha": 3, "target_modules": [attention], **others},
        "up": {"r": 4, "target_modules": [first], **others},
        "down": {"r": 4, "target_modules": [second], **others},
    }


@dataclass
class Peers:
    """The same adapters in our engine and in PEFT."""

    world: World
    peft_model: peft.PeftModel
    digests: dict[str, str]

    def composition(self, weights: Weights) -> Composition:
        """In the order of the digests, as names are resolved."""
        uses = [self.world.use(self.digests[name], scale)[0] for name, scale in weights.items()]
        return tuple(sorted(uses, key=lambda use: use.digest))

    @torch.inference_mode()
    def expected(self, weights: Weights, how: str) -> Tensor:
        """PEFT's logits of `PROMPT` [length, V]."""
        name = "-".join([how, *(f"{name}{round(1000 * scale)}" for name, scale in weights.items())])
        if name not in self.peft_model.peft_config:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
                options = {"combination_type": how}
                self.peft_model.add_weighted_adapter(list(weights), list(weights.values()), name, **options)
        self.peft_model.set_adapter(name)
        self.peft_model.eval()  # a new adapter comes with its dropout switched on
        return self.peft_model(torch.tensor([PROMPT])).logits[0]

    def summed(self, weights: Weights) -> Tensor:
        """The oracle's: every delta by itself."""
        oracle = Oracle(self.world.reference, self.world.base.targets)
        return oracle.logits(PROMPT, [(self.world.adapters[self.digests[n]], scale) for n, scale in weights.items()])

    def logits(self, *sums: Weights) -> list[Tensor]:
        """Ours, of all of them in the same batches, their prompts in several chunks."""
        with self.world.engine(max_num_batched_tokens=40) as engine:
            driver = Driver(engine)
            for index, weights in enumerate(sums):
                composition = self.composition(weights)
                driver.add(request(str(index), PROMPT, composition, prompt_logprobs=0, max_tokens=1))
            driver.run()
            recorded = self.world.runner.recorded
        return [torch.stack([recorded[str(i)][at] for at in range(len(PROMPT))]) for i in range(len(sums))]


def halved(model: peft.PeftModel) -> None:
    """`high` keeps the first half of its ranks, `low` the second: nothing of one meets anything of the other."""
    for name, parameter in model.named_parameters():
        for adapter, empty in (("high", slice(3, None)), ("low", slice(None, 3))):
            if f"lora_A.{adapter}." in name:
                parameter.data[empty] = 0
            elif f"lora_B.{adapter}." in name:
                parameter.data[:, empty] = 0


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    folder: Path = tmp_path_factory.mktemp(request.param)
    world = make_world(request.param)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        peft_model = with_adapters(copy.deepcopy(world.reference), shapes(request.param))
        halved(peft_model)
        peft_model.save_pretrained(str(folder))
    digests = {}
    with AdapterStore(folder / "store") as store:
        reader = AdapterReader(store.blobs, world.base.targets, torch.float32, 64, world.base.tensor_of)
        for name in shapes(request.param):
            with store.import_folder(folder / name) as staging:
                reader.check(staging.folder)
                digests[name] = store.commit(staging)
                world.adapters[digests[name]] = reader.read(digests[name])
    return Peers(world, peft_model, digests)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of a position, as a share of its range."""
    spread = other.amax(-1) - other.amin(-1)
    return float(((one - other).abs().amax(-1) / spread).max())


CAT: list[Weights] = [
    {"one": 0.7, "two": 1.25},
    {"one": 1.0, "two": 1.0, "three": 1.0},  # a tree of depth three
    {"wide": 1.0, "one": 0.5, "high": 2.0},
    {"up": 0.3},
]
LINEAR: list[Weights] = [
    {"up": 0.7, "down": 1.25},  # no module is changed by both
    {"high": 0.7, "low": 1.25},  # in no module a rank is used by both
    {"one": 0.6},
]


def test_a_composition_is_pefts_cat(peers: Peers):
    found = peers.logits(*CAT, {})
    for weights, ours in zip(CAT, found, strict=False):
        assert distance(ours, peers.expected(weights, "cat")) <= TOLERANCE, weights
        assert distance(ours, peers.summed(weights)) <= TOLERANCE, weights
        assert distance(ours, found[-1]) > 100 * TOLERANCE, "and not the base"


def test_it_is_pefts_linear_where_that_is_the_sum(peers: Peers):
    for weights, ours in zip(LINEAR, peers.logits(*LINEAR), strict=True):
        assert distance(ours, peers.expected(weights, "linear")) <= TOLERANCE, weights
        assert distance(ours, peers.summed(weights)) <= TOLERANCE, weights


def test_elsewhere_pefts_linear_is_another_thing(peers: Peers):
    """Ours is the sum of the deltas, also where the adapters' ranks and modules meet; PEFT's differs by what one's B
    makes of another's A."""
    weights = {"one": 0.7, "two": 1.25}
    (ours,) = peers.logits(weights)
    theirs = peers.expected(weights, "linear")
    assert distance(ours, peers.summed(weights)) <= TOLERANCE
    assert distance(theirs, peers.summed(weights)) > 100 * TOLERANCE
    name = peers.peft_model.active_adapter
    assert isinstance(name, str)
    seen = 0
    for module in peers.peft_model.modules():
        if not isinstance(module, peft.tuners.lora.Linear) or name not in module.lora_A:
            continue
        own, crossed = crossed_terms(module, weights)
        assert torch.allclose(module.get_delta_weight(name), own + crossed, atol=1e-5)
        assert crossed.abs().max() > 0.1 * own.abs().max()
        seen += 1
    assert seen == 4


def crossed_terms(module: peft.tuners.lora.Linear, weights: Weights) -> tuple[Tensor, Tensor]:
    """Of PEFT's linear combination the sum of the deltas, and the rest."""
    a, b = ({n: getattr(module, part)[n].weight.data for n in weights} for part in ("lora_A", "lora_B"))
    root = {name: math.sqrt(weight * module.scaling[name]) for name, weight in weights.items()}
    terms = {(i, j): root[i] * root[j] * b[i] @ a[j] for i in weights for j in weights}
    own = sum((terms[i, i] for i in weights), torch.zeros(()))
    crossed = sum((term for (i, j), term in terms.items() if i != j), torch.zeros(()))
    return (own.T, crossed.T) if module.fan_in_fan_out else (own, crossed)


def test_a_sum_is_bit_equal_to_itself_alone(peers: Peers):
    """Beside the base, its own parts, the same sum at other scales and others that share an adapter with it."""
    assert peers.world.is_batch_invariant
    sums: list[Weights] = [
        *CAT,
        {},
        {"one": 1.0},
        {"one": 0.35, "two": 0.625},
        {"two": -1.0, "three": 0.5},
        {"one": 1.0, "two": 1.0},
        {"high": 1.0, "low": 1.0, "up": 1.0, "down": 1.0},
    ]
    together = peers.logits(*sums)
    for weights, ours in zip(sums, together, strict=True):
        (alone,) = peers.logits(weights)
        assert torch.equal(ours, alone), weights
