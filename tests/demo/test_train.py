"""Packing and training, on a model small enough to train in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer

import loraplex.demo
from loraplex.demo.base_training import new_model
from loraplex.demo.chat import Piece, conversation
from loraplex.demo.corpus import base_document
from loraplex.demo.packing import IGNORED, Packer
from loraplex.demo.recipe import MIXTURE, SHAPE, Schedule
from loraplex.demo.train import exact_documents, learning_rate, train

TOKENIZER = Path(loraplex.demo.__file__).parent / "base" / "tokenizer.json"
SCHEDULE = Schedule(steps=6, learning_rate=1e-2, rows=3, row_tokens=96, warmup=2)
TINY = replace(SHAPE, layers=2, hidden=32, heads=4, kv_heads=2, feed_forward=48)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


def base_packer(tokenizer: Tokenizer, seed: str = "test") -> Packer:
    return Packer(tokenizer, lambda rng: base_document(rng, MIXTURE), SCHEDULE.rows, SCHEDULE.row_tokens, seed)


def tiny_model(tokenizer: Tokenizer) -> torch.nn.Module:
    torch.manual_seed(0)
    return new_model(TINY, tokenizer.get_vocab_size())


def test_packed_rows_are_whole_documents_with_answers_as_labels(tokenizer: Tokenizer) -> None:
    def draw(rng: Random) -> list[Piece]:
        return conversation([("a dog sees the cat", "A DOG SEES THE CAT")] * rng.randint(1, 2))

    batch = Packer(tokenizer, draw, 3, 96, "x").batch(0)
    assert batch.input_ids.shape == batch.labels.shape == (3, 96)
    texts = set()
    for row in range(3):
        for number in range(1, int(batch.segments[row].max()) + 1):
            mine = batch.segments[row] == number
            assert batch.positions[row][mine].tolist() == list(range(int(mine.sum())))
            learned = batch.labels[row][mine]
            answers = tokenizer.decode(learned[learned != IGNORED].tolist(), skip_special_tokens=False)
            assert answers.replace("<|end|>", "\n").strip().split("\n") in (
                ["A DOG SEES THE CAT"],
                ["A DOG SEES THE CAT"] * 2,
            )
            texts.add(tokenizer.decode(batch.input_ids[row][mine].tolist(), skip_special_tokens=False))
    # the last token is predicted, never fed
    one = "<|user|>a dog sees the cat<|end|><|assistant|>A DOG SEES THE CAT"
    assert texts == {f"<s>{one}", f"<s>{one}<|end|>{one}"}


def test_documents_of_a_row_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer).eval()
    batch = base_packer(tokenizer).batch(0)
    with torch.inference_mode():
        packed = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_bias(),
            position_ids=batch.positions,
            use_cache=False,
        ).logits
        for number in range(1, int(batch.segments[0].max()) + 1):
            mine = batch.segments[0] == number
            alone = model(input_ids=batch.input_ids[:1, mine]).logits[0]
            torch.testing.assert_close(packed[0, mine], alone, atol=1e-4, rtol=0)


def test_batches_depend_on_seed_and_step_alone(tokenizer: Tokenizer) -> None:
    first, again = base_packer(tokenizer), base_packer(tokenizer)
    first.batch(0)
    assert torch.equal(first.batch(3).input_ids, again.batch(3).input_ids)
    assert not torch.equal(again.batch(3).input_ids, again.batch(4).input_ids)
    assert not torch.equal(again.batch(3).input_ids, base_packer(tokenizer, "other").batch(3).input_ids)


def test_an_interrupted_run_continues_to_the_same_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def run(checkpoint: Path, stop_after: int | None = None) -> torch.nn.Module:
        model = tiny_model(tokenizer)
        parameters = list(model.parameters())
        for report in train(model, parameters, SCHEDULE, base_packer(tokenizer), checkpoint, 2):
            if report.step == stop_after:
                break
        return model

    whole = run(tmp_path / "whole.pt")
    # step 3 is lost with the interruption and done again
    run(tmp_path / "parts.pt", stop_after=3)
    resumed = run(tmp_path / "parts.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_training_learns(tokenizer: Tokenizer) -> None:
    def draw(_: Random) -> list[Piece]:
        return conversation([("a dog", "A DOG")])

    model, packer = tiny_model(tokenizer), Packer(tokenizer, draw, 3, 96, "x")
    schedule = replace(SCHEDULE, steps=40)
    exact, documents = exact_documents(model, packer.batch(0))
    assert exact == 0
    assert documents > 10
    losses = [report.loss for report in train(model, list(model.parameters()), schedule, packer)]
    assert losses[-1] < 0.1 * losses[0]
    exact, documents = exact_documents(model, packer.batch(0))
    assert exact == documents


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, rows=1, warmup=10)
    rates = [learning_rate(schedule, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01
