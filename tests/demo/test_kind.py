"""What an adapter is called."""

from __future__ import annotations

import pytest

from loraplex.demo.kind import kind_of, short_names


@pytest.mark.parametrize(
    ("targets", "use_dora", "use_rslora", "kind"),
    [
        (["q_proj"], False, False, "LoRA"),
        (["q_proj"], True, False, "DoRA"),
        (["q_proj"], False, True, "rsLoRA"),
        (["q_proj"], True, True, "DoRA + rsLoRA"),
        (["lm_head", "q_proj"], False, False, "LoRA + head"),
        (["embed_tokens", "lm_head"], False, True, "rsLoRA + embedding + head"),
    ],
)
def test_the_kind_says_all_that_is_not_plain(targets, use_dora, use_rslora, kind) -> None:
    assert kind_of(targets, use_dora, use_rslora) == kind


def test_short_names_follow_the_forward_pass_and_lose_nothing() -> None:
    assert short_names({"lm_head", "up_proj", "q_proj", "embed_tokens"}) == "embed_tokens q up lm_head"
    assert short_names(["qkv_proj", "fc1", "q_proj"]) == "q fc1 qkv"
