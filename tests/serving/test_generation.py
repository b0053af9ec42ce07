"""Generation with an engine that plays a script: text, stops, usage, failures, and what is let go of."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplex import errors
from loraplex.engine.messages import EngineRequest, Failure, FinishReason, SequenceOutput, TokenLogprobs
from loraplex.engine.sampling_params import SamplingParams
from loraplex.model.tokenizer import Tokenizer
from loraplex.serving.generation import ChoiceDelta, Generation, OutputOptions, as_error


def make_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = RustTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))


TOKENIZER = make_tokenizer()


class Script:
    """Plays these outputs, whatever is submitted."""

    is_alive = True

    def __init__(self, outputs: list[SequenceOutput]):
        self.outputs = outputs
        self.aborted: list[str] = []
        self.was_closed = False

    async def submit(self, requests: tuple[EngineRequest, ...]) -> AsyncGenerator[SequenceOutput]:
        try:
            for output in self.outputs:
                yield output
        finally:
            self.was_closed = True

    def abort(self, seq_ids: tuple[str, ...]) -> None:
        self.aborted += seq_ids

    async def command(self, name: str, **arguments) -> None: ...


def say(
    text: str, reason: FinishReason | None = FinishReason.LENGTH, seq_id: str = "0", **fields
) -> list[SequenceOutput]:
    """One output a byte; the last one with `reason`."""
    ids = TOKENIZER.encode(text)
    return [
        SequenceOutput(seq_id, token, finish_reason=reason if i == len(ids) - 1 else None, **fields)
        for i, token in enumerate(ids)
    ]


def generation_of(outputs: list[SequenceOutput], *, num_sequences: int = 1, n: int = 1, echo: bool = False, **options):
    script = Script(outputs)
    params = SamplingParams(max_tokens=100, prompt_logprobs=0 if echo else None, logprobs=0 if echo else None)
    lifetime = AsyncExitStack()
    generation = Generation(
        request_id="id",
        model="m@1",
        adapter="m@1",
        requests=[
            EngineRequest(seq_id=str(i), token_ids=tuple(TOKENIZER.encode("pro")), params=params)
            for i in range(num_sequences)
        ],
        options=OutputOptions(echo=echo, **options),
        num_choices=n,
        engine=script,
        tokenizer=TOKENIZER,
        lifetime=lifetime,
    )
    closed: list[bool] = []
    lifetime.callback(closed.append, True)
    return generation, script, closed


async def deltas_of(generation: Generation) -> list[ChoiceDelta]:
    return [delta async for delta in generation.deltas()]


async def test_text_and_usage():
    generation, script, closed = generation_of(say("né 😀", num_cached_tokens=2))
    deltas = await deltas_of(generation)
    assert [delta.text for delta in deltas if delta.text] == ["n", "é", " ", "😀"]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    usage = generation.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 8, 2)
    assert closed == [True]
    assert script.was_closed
    await generation.close()  # more than once is fine
    assert closed == [True]


async def test_the_token_that_ends_is_no_text_but_counts():
    generation, *_ = generation_of(say("ab!", FinishReason.STOP))
    assert "".join(delta.text for delta in await deltas_of(generation)) == "ab"
    assert generation.usage.completion_tokens == 3


async def test_half_a_character_at_the_end_is_not_shown():
    outputs = say("a😀")[:3]
    outputs[-1] = SequenceOutput("0", outputs[-1].token_id, finish_reason=FinishReason.LENGTH)
    generation, *_ = generation_of(outputs)
    assert "".join(delta.text for delta in await deltas_of(generation)) == "a"


async def test_a_stop_string_aborts_its_choice_only():
    outputs = [o for pair in zip(say("one two"), say("the rest", seq_id="1"), strict=False) for o in pair]
    outputs += say("!", seq_id="1")
    generation, script, closed = generation_of(outputs, num_sequences=2, n=2, stop=("e t", "never"))
    deltas = await deltas_of(generation)
    first = [delta for delta in deltas if delta.index == 0]
    assert "".join(delta.text for delta in first) == "on"
    assert (first[-1].finish_reason, first[-1].stop_reason) == (FinishReason.STOP, "e t")
    assert "0" in script.aborted
    assert closed == [True]
    second = [delta for delta in deltas if delta.index == 1]
    assert second[-1].finish_reason is not None
    assert generation.usage.prompt_tokens == 3  # n choices share their prompt


async def test_what_was_held_back_comes_at_the_end():
    generation, *_ = generation_of(say("ab st"), stop=("stop",))
    deltas = await deltas_of(generation)
    assert deltas[-1].text == "st"


async def test_min_tokens_counts_tokens():
    generation, *_ = generation_of(say("xxxx"), stop=("x",), min_tokens=2)
    deltas = await deltas_of(generation)
    assert "".join(delta.text for delta in deltas) == "xx"
    assert deltas[-1].stop_reason == "x"


async def test_echo_begins_with_the_prompt():
    logprob = TokenLogprobs(1, -0.5)
    first, *rest = say("ab")
    first = SequenceOutput("0", first.token_id, TokenLogprobs(first.token_id or 0, -1.0), (logprob, logprob))
    rest = [
        SequenceOutput("0", o.token_id, TokenLogprobs(o.token_id or 0, -1.0), finish_reason=o.finish_reason)
        for o in rest
    ]
    generation, *_ = generation_of([first, *rest], echo=True)
    deltas = await deltas_of(generation)
    assert "".join(delta.text for delta in deltas) == "proab"
    tokens = [token for delta in deltas for token in delta.tokens]
    assert len(tokens) == 5
    assert tokens[0].logprobs is None


async def test_a_failure_is_raised_and_everything_let_go():
    failure = Failure("engine_step_failed", "boom")
    outputs = [*say("ab", None), SequenceOutput("0", finish_reason=FinishReason.ERROR, failure=failure)]
    generation, script, closed = generation_of(outputs)
    with pytest.raises(errors.RequestFailed, match="boom"):
        await deltas_of(generation)
    assert closed == [True]
    assert script.was_closed


async def test_leaving_early_lets_go():
    generation, script, closed = generation_of(say("abc"))
    async with aclosing(generation.deltas()) as deltas:
        async for _ in deltas:
            break
    assert closed == [True]
    assert script.was_closed


async def test_never_started():
    generation, script, closed = generation_of(say("abc"))
    await generation.close()
    assert closed == [True]
    assert not script.was_closed


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("context_length_exceeded", errors.ContextLengthExceeded),
        ("invalid_request", errors.InvalidRequest),
        ("duplicate_request", errors.InvalidRequest),
        ("overloaded", errors.Overloaded),
        ("adapter_load_failed", errors.AdapterLoadFailed),
        ("adapter_too_large", errors.AdapterLoadFailed),
        ("engine_stopped", errors.NotReady),
        ("anything_else", errors.RequestFailed),
    ],
)
def test_failures_by_code(code, kind):
    error = as_error(Failure(code, "why"))
    assert type(error) is kind
    assert error.message == "why"


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 has it: <0x..> for the bytes of characters that the vocabulary lacks."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁the": 257, "n": 258}
    backend = RustTokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


async def test_byte_fallback_tokens_come_whole_and_their_logprobs_are_bytes():
    tokenizer = byte_fallback_tokenizer()
    ids = [257, 258, *(byte + 1 for byte in "é😀".encode()), 1000, 258]  # 1000: the logits are wider than the tokenizer
    outputs = [
        SequenceOutput(
            "0", token, logprobs=TokenLogprobs(token, -0.5), finish_reason=None if i < 9 else FinishReason.LENGTH
        )
        for i, token in enumerate(ids)
    ]
    generation, *_ = generation_of(outputs)
    generation = replace(generation, tokenizer=tokenizer, engine=Script(outputs), _choices={})
    deltas = await deltas_of(generation)
    assert [delta.text for delta in deltas] == [" the", "n", "", "é", "", "", "", "😀", "", "n"]
    tokens = [token.token_id for delta in deltas for token in delta.tokens]
    assert tokens == ids
    assert b"".join(map(tokenizer.token_bytes, tokens)) == " thené😀n".encode()


async def test_an_adapters_end_token_ends_as_eos_does():
    ended = SequenceOutput("0", 65, finish_reason=FinishReason.STOP, stop_reason=65)
    for ends, reason in ((frozenset({65}), None), (frozenset(), 65)):
        generation, *_ = generation_of([*say("ab", None), ended])
        generation = replace(generation, end_token_ids=ends, engine=Script([*say("ab", None), ended]), _choices={})
        last = (await deltas_of(generation))[-1]
        assert (last.text, last.finish_reason, last.stop_reason) == ("", FinishReason.STOP, reason)
