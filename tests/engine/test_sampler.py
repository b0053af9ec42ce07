"""Sampling: draws follow the truncated softmax, a row knows nothing of its batch, adjustments equal plain formulas."""

import importlib
import math

import pytest
import torch
import torch.utils._python_dispatch
from scheduler_rig import make_sequence

from loraplex.engine import sampler as sampling
from loraplex.engine.sampler import Sampler
from loraplex.engine.sequence import Sequence
from loraplex.ops import select_ops

EOS = 2
VOCAB = 12
LOGITS = torch.tensor([1.5, 0.2, -1.0, 2.0, 0.0, -3.0, 1.9, 0.7, 0.7, -0.5, 1.0, -8.0])


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(frozenset({EOS}), select_ops("cpu"))


def sequence(prompt=(3, 4), output=(), choice: int = 0, **params) -> Sequence:
    seq = make_sequence("s", prompt, **{"max_tokens": 100_000, **params})
    object.__setattr__(seq.request, "choice", choice)
    seq.token_ids += output
    return seq


def sample(sampler: Sampler, logits: torch.Tensor, seqs: list) -> list[int]:
    return sampler.choose(logits, seqs).tolist()


def draws(sampler: Sampler, logits: torch.Tensor, count: int, **params) -> torch.Tensor:
    """How often each token comes at `count` positions of one sequence."""
    seqs = []
    for position in range(count):
        seq = sequence(**params)
        seq.token_ids += [0] * position
        seqs.append(seq)
    tokens = sample(sampler, logits.expand(count, -1).clone(), seqs)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits))


def expected_probabilities(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """By the book, token by token, in float64."""
    p = (logits.double() / temperature).softmax(-1)
    keep = [i for i in range(len(p)) if p[i] >= min_p * p.max()]
    if top_k:
        floor = sorted((float(p[i]) for i in keep), reverse=True)[:top_k][-1]
        keep = [i for i in keep if p[i] >= floor]
    total = sum(float(p[i]) for i in keep)
    nucleus, mass = [], 0.0
    for i in sorted(keep, key=lambda i: -float(p[i])):
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += float(p[i]) / total
    q = torch.zeros_like(p)
    q[nucleus] = p[nucleus]
    return q / q.sum()


TRUNCATIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 4},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.001},
    {"min_p": 0.3},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("params", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("seed", [0, -5])
def test_draws_follow_the_truncated_softmax(sampler: Sampler, params: dict, seed: int):
    """Chi-squared with a bound that a right sampler passes at these fixed seeds and a wrong one does not."""
    count = 4000
    observed = draws(sampler, LOGITS, count, seed=seed, **{"temperature": 1.0, **params})
    expected = expected_probabilities(LOGITS, **params) * count
    assert not observed[expected == 0].any(), "a token that was cut off came"
    possible = expected > 0
    statistic = float(((observed - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom) + 3


def test_equals_of_the_kth_stay_and_the_most_likely_always_does(sampler: Sampler):
    tied = torch.tensor([1.0, 5.0, 5.0, 5.0, 0.0])
    observed = draws(sampler, tied, 600, temperature=1.0, top_k=2)
    assert observed[0] == observed[4] == 0
    assert observed[1:4].min() > 100
    assert draws(sampler, LOGITS, 50, temperature=1.0, min_p=1.0)[3] == 50


def test_a_row_is_the_same_in_any_batch(sampler: Sampler):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 300, generator=generator) * 3
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 9},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.3},
    ]
    seqs = [sequence(output=range(i), seed=i, choice=i % 3, **kinds[i % len(kinds)]) for i in range(40)]
    together = sample(sampler, logits.clone(), seqs)
    assert [sample(sampler, logits[i : i + 1].clone(), [seqs[i]])[0] for i in range(40)] == together
    order = torch.randperm(40, generator=generator).tolist()
    assert sample(sampler, logits[order].clone(), [seqs[i] for i in order]) == [together[i] for i in order]


def test_a_draw_depends_on_seed_choice_and_position(sampler: Sampler):
    flat = torch.zeros(1, 5000)
    variants = [{}, {"seed": 1}, {"choice": 1}, {"output": [5]}]
    tokens = [sample(sampler, flat.clone(), [sequence(temperature=1.0, **variant)])[0] for variant in variants]
    assert len(set(tokens)) == len(variants)
    # ... and on nothing else: not the prompt, nor what the output was.
    same = [
        sample(sampler, flat.clone(), [sequence(prompt, [token], temperature=1.0)])[0]
        for prompt, token in (((3, 4), 5), ((9,), 8))
    ]
    assert same == [tokens[3]] * 2


def test_small_differences_change_few_draws(sampler: Sampler):
    """Noise of bfloat16's size flips a draw about as seldom as it flips the greedy token."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 200, generator=generator) * 4
    noisy = logits + torch.randn(logits.shape, generator=generator) * 0.01
    seqs = [sequence(seed=i, temperature=1.0) for i in range(500)]
    changed = sum(a != b for a, b in zip(sample(sampler, logits, seqs), sample(sampler, noisy, seqs), strict=True))
    assert changed <= 15


def test_greedy_takes_the_first_of_equals(sampler: Sampler):
    assert sample(sampler, torch.tensor([[0.0, 3.0, 3.0, 1.0]]), [sequence(temperature=0.0)]) == [1]
    assert sample(sampler, torch.empty(0, 4), []) == []


def test_a_tiny_temperature_is_greedy_and_not_a_nan(sampler: Sampler):
    for temperature in (1e-300, 1e-38, 1e-5, 1e-3):
        seq = sequence(temperature=temperature, top_p=0.9, top_k=3, min_p=0.1)
        assert sample(sampler, LOGITS.unsqueeze(0) * 50, [seq]) == [3]


@pytest.mark.parametrize("vocabulary", [1, 12, 300, 2000])
def test_sorting_finds_the_nuclei_that_the_prefix_finds(vocabulary: int):
    """The way of a device that is not to be waited for, on a CPU to the bit: flat and steep rows, equals at the border,
    what min_p or top_k has cut already; rows beside each other and alone."""
    generator = torch.Generator().manual_seed(vocabulary)
    scales = torch.tensor([0.0, 0.1, 1.0, 5.0, 40.0]).repeat(8)
    logits = torch.randn(len(scales), vocabulary, generator=generator) * scales.unsqueeze(1)
    logits[::2] = logits[::2].round()
    logits[1::3, vocabulary // 2 :].masked_fill_(torch.rand(vocabulary - vocabulary // 2) < 0.5, -torch.inf)
    rows = list(range(0, len(scales), 2)) + [1, 5]
    top_p = [0.05 + 0.9 * i / len(rows) for i in range(len(rows))]
    wanted, found = logits.clone(), logits.clone()
    sampling.mask_by_prefix(wanted, rows, top_p)
    sampling.mask_by_sorting(found, rows, top_p)
    assert torch.equal(found, wanted)
    for row, own in zip(rows, top_p, strict=True):
        alone = logits[row : row + 1].clone()
        sampling.mask_by_sorting(alone, [0], [own])
        assert torch.equal(alone[0], found[row])


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host asks a tensor for its numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        waits = {"_local_scalar_dense", "nonzero", "item", "_unique2", "is_nonzero", "equal"}
        # what is found on the host, before it is sent, may count
        assert name not in waits or name == "_unique2", f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_choosing_waits_for_no_device(monkeypatch: pytest.MonkeyPatch):
    """Every kind of row at once, as on a device that is no CPU."""
    monkeypatch.setattr(sampling, "mask_by_prefix", sampling.mask_by_sorting)
    monkeypatch.setattr(sampling, "_argmax", lambda logits: logits.argmax(-1))
    kinds = [{"temperature": 0.0}, *TRUNCATIONS[1:], *ADJUSTMENTS]
    seqs = [sequence((3, 4, 3), (6, 6, 10, 5), **{"temperature": 1.0, **kind}) for kind in kinds]
    logits = LOGITS.expand(len(seqs), -1).clone()
    tokens = sample(sampler_of("torch_ops"), logits, seqs)
    with Watched():
        found = sampler_of("torch_ops").choose(logits, seqs)
        rated = sampling.rate(logits, found, 3)
    assert found.tolist() == tokens
    assert all(len(part) == len(seqs) for part in rated)


def sampler_of(name: str) -> Sampler:
    return Sampler(frozenset({EOS}), importlib.import_module(f"loraplex.ops.{name}"))


# -- adjustments ----------------------------------------------------------------------------------------------------


def adjusted(logits: torch.Tensor, seq: Sequence, ends: frozenset[int] = frozenset({EOS})) -> list[float]:
    """The documented order, one token at a time."""
    params = seq.request.params
    row = logits.tolist()
    for token, bias in params.logit_bias:
        row[token] += bias
    if seq.num_output_tokens < params.min_tokens:
        for token in ends | params.stop_token_ids:
            row[token] = -math.inf
    output = seq.token_ids[seq.num_prompt_tokens :]
    for token in set(seq.token_ids):
        penalty = params.repetition_penalty
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in set(output):
        row[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return row


ADJUSTMENTS = [
    {"logit_bias": ((0, 3.5), (3, -2.0), (11, 100.0), (0, 1.0))},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.75},
    {"min_tokens": 9, "stop_token_ids": frozenset({3, 6})},
    {"repetition_penalty": 1.3, "presence_penalty": -1.0, "frequency_penalty": 0.5, "min_tokens": 50,
     "logit_bias": ((EOS, 100.0), (7, 0.25))},
]  # fmt: skip


@pytest.mark.parametrize("params", ADJUSTMENTS, ids=str)
@pytest.mark.parametrize("output", [(), (6, 6, 10, 5)])
def test_adjustments_equal_the_plain_formulas(sampler: Sampler, params: dict, output):
    seq = sequence((3, 4, 3), output, temperature=0.0, **params)
    row = LOGITS.clone()
    sampler._adjust(row, seq)
    assert row.tolist() == pytest.approx(adjusted(LOGITS, seq), abs=1e-5)
    assert sample(sampler, LOGITS.unsqueeze(0), [seq]) == [int(torch.tensor(adjusted(LOGITS, seq)).argmax())]


def test_the_logits_are_not_changed(sampler: Sampler):
    logits = LOGITS.unsqueeze(0).clone()
    sample(sampler, logits, [sequence(temperature=1.0, top_k=2, logit_bias=((0, 9.0),), repetition_penalty=2.0)])
    assert torch.equal(logits[0], LOGITS)


def test_min_tokens_forbids_every_end(sampler: Sampler):
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, [EOS, 5]] = 50.0
    logits[0, 7] = 0.0
    params = {"min_tokens": 2, "stop_token_ids": frozenset({5, VOCAB + 3}), "temperature": 0.0}
    assert sample(sampler, logits, [sequence(output=[1], **params)]) == [7]
    assert sample(sampler, logits, [sequence(output=[1, 1], **params)]) == [EOS]


def test_a_neighbours_adjustments_stay_its_own(sampler: Sampler):
    logits = LOGITS.expand(2, -1).clone()
    biased = sequence(temperature=0.0, logit_bias=((5, 100.0),))
    assert sample(sampler, logits, [sequence(temperature=0.0), biased]) == [3, 5]


# -- logprobs -------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_raw_log_softmax(sampler: Sampler):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator) * 3
    tokens, counts = [3, 39, 0, 7, 7], [0, 1, 5, 20, 2]
    expected = logits.double().log_softmax(-1)
    for i, found in enumerate(sampler.logprobs(logits, tokens, counts)):
        assert found.token_id == tokens[i]
        assert found.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-5)
        best = expected[i].argsort(descending=True)[: counts[i]].tolist()
        assert [token for token, _ in found.top] == best
        assert dict(found.top).get(tokens[i], found.logprob) == found.logprob, "the very same float"


def test_the_chosen_one_is_the_very_same_float_among_the_best(sampler: Sampler):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 40, generator=generator)
    best = logits.argmax(-1).tolist()
    for found in sampler.logprobs(logits, best, [3] * 30):
        assert found.top[0] == (found.token_id, found.logprob)
    alone = [sampler.logprobs(logits[i : i + 1], best[i : i + 1], [3])[0] for i in range(30)]
    assert alone == sampler.logprobs(logits, best, [3] * 30)
    assert sampler.logprobs(logits[:0], [], []) == []
