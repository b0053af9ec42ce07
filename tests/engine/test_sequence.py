"""One counter of progress for prompt, chunks, decode and resumption."""

from scheduler_rig import make_sequence, uses

from loraplex.engine.scheduled_batch import ScheduledSequence
from loraplex.engine.sequence import SequenceStatus


def test_a_life():
    seq = make_sequence("s", [1, 2, 3, 4], uses("a", "b"))
    assert seq.status is SequenceStatus.WAITING
    assert (seq.num_tokens, seq.num_prompt_tokens, seq.num_new_tokens, seq.num_output_tokens) == (4, 4, 4, 0)
    assert not ScheduledSequence(seq, 3, (0, 1)).is_last_chunk
    seq.num_computed_tokens = 3
    assert ScheduledSequence(seq, 1, (0, 1)).is_last_chunk
    seq.num_computed_tokens = 4
    seq.token_ids.append(9)
    assert (seq.num_new_tokens, seq.num_output_tokens) == (1, 1)
    seq.num_computed_tokens = 0  # preempted
    assert seq.num_new_tokens == 5
    assert ScheduledSequence(seq, 5, (0, 1)).is_last_chunk


def test_views_of_the_request():
    assert make_sequence("s", [1], uses("b", "a")).digests == ("b", "a")
    assert make_sequence("s", [1]).digests == ()
    assert not make_sequence("s", [1]).wants_prompt_logprobs
    assert make_sequence("s", [1], prompt_logprobs=0).wants_prompt_logprobs
    assert repr(make_sequence("s", [1, 2])) == "Sequence(s, WAITING, 0/2)"


def test_the_request_is_not_changed():
    seq = make_sequence("s", [1, 2])
    seq.token_ids.append(3)
    assert seq.request.token_ids == (1, 2)
