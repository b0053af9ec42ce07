"""adapter_config.json by the closed list: every field understood, ignored with a reason, or refused by name."""

import dataclasses
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.errors import AdapterInvalid
from loraplex.lora.digest import MAX_CONFIG_BYTES
from loraplex.lora.fields import IGNORED, REFUSED, UNDERSTOOD
from loraplex.lora.patterns import MatchClock, PatternTable
from loraplex.lora.peft import PeftConfig
from loraplex.lora.rules import ModuleRules

PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def parse(**fields: Any) -> PeftConfig:
    return PeftConfig.from_bytes(json.dumps({**PLAIN, **fields}).encode())


def refusal(**fields: Any) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        parse(**fields)
    return caught.value.message


def test_a_plain_config():
    config = parse(use_rslora=True, fan_in_fan_out=True, base_model_name_or_path="meta/llama")
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16.0, ("q_proj",))
    assert config.use_rslora
    assert config.fan_in_fan_out
    assert config.base_model == "meta/llama"
    assert [field for field, _ in config.ignored] == ["base_model_name_or_path"]


def unlisted(config_class: Any) -> list[str]:
    """Fields of a PEFT config that are not on exactly one of the three lists."""
    names = [field.name for field in dataclasses.fields(config_class)]
    return [name for name in names if (name in UNDERSTOOD) + (name in IGNORED) + (name in REFUSED) != 1]


def test_every_field_of_peft_is_on_the_list():
    import peft

    new = unlisted(peft.LoraConfig)
    assert not new, f"{new} is new in PEFT {peft.__version__}: put it on one of the three lists"
    # what PEFT writes into the file are these fields and no others
    written = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], ensure_weight_tying=True).to_dict()
    assert written.keys() <= {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert len(written) > 40


def test_a_new_field_of_peft_would_be_seen():
    import peft

    config_class = dataclasses.make_dataclass("Next", [("use_zeta", bool, False)], bases=(peft.LoraConfig,))
    assert unlisted(config_class) == ["use_zeta"]
    assert "use_zeta" in refusal(use_zeta=True)


def test_every_refused_field_is_named():
    for field in REFUSED:
        message = refusal(**{field: [{"a": "value"}]})
        assert field in message
        assert message.count(".") >= 2, "what, why, next step"


def test_pefts_defaults_pass_as_they_are_written():
    import peft

    written = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    written["target_modules"] = sorted(written["target_modules"])
    config = PeftConfig.from_bytes(json.dumps(written).encode())
    assert config.r == 8
    assert dict(config.ignored).keys() <= IGNORED.keys() | {"init_lora_weights"}


@pytest.mark.parametrize("field", sorted(IGNORED))
def test_ignored_fields_are_told_with_a_reason(field: str):
    assert dict(parse(**{field: "value"}).ignored)[field]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("alora_invocation_tokens", [5]),
        ("arrow_config", {"top_k": 3}),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("a_field_of_peft_9", 3),
        ("a_field_of_peft_9", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "PiSSA_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", "something new"),
        ("init_lora_weights", 3),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, value: Any):
    assert repr(field) in refusal(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"auto_map_v2": "x"},
        {"custom_pipelines": {"x": {}}},
        {"custom_anything": "os.system"},
        {"base_model_class": "Evil"},
        {"parent_library": "os"},
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "transformers_evil"}},
        {"auto_mapping": {"parent_library": "transformers", "more": 1}},
        {"auto_mapping": "transformers"},
    ],
)
def test_code_is_never_run(fields: dict[str, Any]):
    assert "never run" in refusal(**fields)


def test_what_is_trained_beside_the_lora():
    config = parse(bias="all", modules_to_save=["norm"], trainable_token_indices=[5, 3], ensure_weight_tying=True)
    assert (config.bias, config.modules_to_save, config.ensure_weight_tying) == ("all", ("norm",), True)
    assert config.token_indices == {"": (5, 3)}
    assert parse(trainable_token_indices={"lm_head": [7]}).token_indices == {"lm_head": (7,)}
    assert parse(bias=None).bias == parse(bias="none").bias == "none"


def test_target_parameters_may_stand_alone():
    config = parse(target_modules=[], target_parameters=["experts.gate_up_proj"])
    assert (config.target_modules, config.target_parameters) == ((), ("experts.gate_up_proj",))


def test_transformers_auto_mapping_is_ignored():
    library = "transformers.models.llama.modeling_llama"
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": library, "unsloth_fixed": True}
    assert dict(parse(auto_mapping=mapping).ignored)["auto_mapping"]


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_harmless_initialisations(value: Any):
    parse(init_lora_weights=value)


@pytest.mark.parametrize("off", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_is_accepted(off: Any):
    parse(a_field_of_peft_9=off)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"r": 0}, "r to 0"),
        ({"r": -1}, "r to -1"),
        ({"r": True}, "r to True"),
        ({"r": 8.0}, "r to 8.0"),
        ({"r": None}, "'r'"),
        ({"r": 10**30}, "r to"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": {"q": 1}}, "target_modules"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"layers_to_transform": [True]}, "layers_to_transform"),
        ({"exclude_modules": 3}, "exclude_modules"),
        ({"target_modules": "q_proj", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_pattern": ["layers"]}, "layers_pattern"),
        ({"bias": "some"}, "bias to 'some'"),
        ({"bias": ["all"]}, "bias to ['all']"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"modules_to_save": ["lm.*head"]}, "modules_to_save"),
        ({"modules_to_save": ["x"] * 300}, "modules_to_save"),
        ({"trainable_token_indices": [1, "2"]}, "trainable_token_indices"),
        ({"trainable_token_indices": [1, -2]}, "trainable_token_indices"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"lm_head": []}}, "trainable_token_indices"),
        ({"trainable_token_indices": 4}, "trainable_token_indices"),
        ({"target_parameters": ["a/b"]}, "target_parameters"),
        ({"target_parameters": "gate_up_proj"}, "target_parameters"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying"),
    ],
)
def test_values_of_a_wrong_kind(fields: dict[str, Any], word: str):
    assert word in refusal(**fields)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"r": NaN}',
        b'{"r": Infinity}',
        b'{"lora_alpha": 1e999}',
        b'{"r": 8, "r": 9}',
        b'{"rank_pattern": {"a": 1, "a": 2}}',
        b"[" * 100_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b" " * (MAX_CONFIG_BYTES + 1),
    ],
)
def test_not_a_json_object(data: bytes):
    with pytest.raises(AdapterInvalid, match="adapter_config.json") as caught:
        PeftConfig.from_bytes(data)
    assert len(caught.value.message) < 500


def test_messages_do_not_echo_an_upload():
    assert len(refusal(use_dora=["x" * 100_000])) < 1000
    assert len(refusal(**{"y" * 100_000: 1})) < 1000


def test_a_byte_order_mark_is_no_error():
    assert PeftConfig.from_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()).r == 8


@given(st.binary(max_size=200))
def test_any_bytes_give_adapter_invalid(data: bytes):
    with pytest.raises(AdapterInvalid):
        PeftConfig.from_bytes(data)


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.10.mlp.gate_proj",
    "model.layers.1.experts.0.gate_proj",
    "transformer.h.3.attn.c_attn",
    "transformer.h.11.mlp.c_fc",
    "lm_head",
    "q_proj",
    "model.layers.1",
]
BROKEN = "x)|(.*"  # whole only between the brackets PEFT puts around the keys of rank_pattern
PARTS = ["q_proj", "v_proj", "gate_proj", "self_attn.q_proj", "layers.1", "c_attn", "model.layers.0.self_attn.q_proj",
         "mlp", "proj", "", "lm_head", "modelXlayers", "model.layers.1.", "experts.0.gate_proj"]  # fmt: skip
EXPRESSIONS = [r".*\.(q|v)_proj", r".*layers\.\d+\..*proj", r"(?i).*Q_PROJ", r"a|.*c_attn", r".*", r".*proj$",
               r"model\.layers\.(?:0|1)\..*", BROKEN, r"[a-z_.0-9]{5,40}"]  # fmt: skip


@settings(max_examples=300)
@given(
    targets=st.lists(st.sampled_from(PARTS), min_size=1, max_size=4) | st.sampled_from(EXPRESSIONS),
    exclude=st.none() | st.lists(st.sampled_from(PARTS), max_size=2) | st.sampled_from(EXPRESSIONS),
    layers=st.none() | st.lists(st.sampled_from([0, 1, 3, 10]), max_size=2) | st.sampled_from([0, 1, 11]),
    pattern=st.none() | st.sampled_from(["layers", "h", ["layers", "h"], ["x", r"\w+"], "experts"]),
)
def test_selection_is_pefts(targets: Any, exclude: Any, layers: Any, pattern: Any):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = {"exclude_modules": exclude, "layers_to_transform": layers, "layers_pattern": pattern}
    # PEFT compiles an expression when a module first meets it, we always
    if BROKEN in (targets, exclude):
        with pytest.raises(AdapterInvalid):
            ModuleRules(parse(target_modules=targets, **fields))
        return
    try:
        theirs = LoraConfig(target_modules=targets, **fields)
        expected = [bool(check_target_module_exists(theirs, name)) for name in NAMES]
    except Exception:  # PEFT refuses the combination, so we must
        with pytest.raises(AdapterInvalid):
            ModuleRules(parse(target_modules=targets, **fields))
        return
    rules = ModuleRules(parse(target_modules=targets, **fields))
    assert [rules.selects(name) for name in NAMES] == expected


@settings(max_examples=300)
@given(
    table=st.dictionaries(
        st.sampled_from([*filter(None, PARTS), *EXPRESSIONS, r"^model.layers.\d.self_attn.q_proj", r".*layers.1.*"]),
        st.integers(1, 64),
        max_size=5,
    ),
    rslora=st.booleans(),
)
def test_rank_and_scaling_are_pefts(table: dict[str, int], rslora: bool):
    import math
    import re

    from peft.utils.other import get_pattern_key

    try:
        keys = [get_pattern_key(table.keys(), name) for name in NAMES]
    except re.error:
        return
    try:
        config = parse(rank_pattern=table, alpha_pattern=dict(reversed(table.items())), use_rslora=rslora)
        rules = ModuleRules(config)
    except AdapterInvalid:
        # ours compiles every key at once, PEFT stops at the first that matches
        assert any("(?i)" in key for key in table)
        return
    alphas = dict(reversed(table.items()))
    for name, key in zip(NAMES, keys, strict=True):
        rank, alpha = table.get(key, 8), alphas.get(get_pattern_key(alphas.keys(), name), 16)
        assert ModuleRules(config).rank_of(name) == rules.rank_of(name) == rank
        assert ModuleRules(config).scaling_of(name) == (alpha / math.sqrt(rank) if rslora else alpha / rank)


def test_all_linear_leaves_the_output_embedding_out():
    rules = ModuleRules(parse(target_modules="All-Linear"))
    assert rules.selects("model.layers.0.mlp.up_proj")
    assert not rules.selects("lm_head")
    assert not ModuleRules(parse(target_modules="all-linear", exclude_modules=["up_proj"])).selects("m.up_proj")


@pytest.mark.parametrize(
    "expression",
    [
        r"(\w|\w\w|.|..|...)*\d\d",
        r"((?:.|..)*)\1\1\d\w\d",
        r"(?:a{1000}){1000}",
        r"a{99999999999}",
        "(" * 5000 + ")" * 5000,
        "(?:" * 200 + "a" + "{0,9}){0,9}" * 100,
        "x" * 20_000 + "+",
        "(unclosed",
        "[[:alpha:]]+",
        "q{e<=1}",
        r"(?<idx>a)",
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_hostile_expressions_end_in_time(expression: str, field: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex.lora.rules.MatchClock", lambda: MatchClock(0.2))
    fields: dict[str, Any] = {field: {expression: 4} if field == "rank_pattern" else expression}
    if field == "layers_pattern":
        fields["layers_to_transform"] = [0]

    def use() -> None:
        rules = ModuleRules(parse(**fields))
        for name in NAMES * 20:
            rules.selects(name * 3 + ".q_proj")
            rules.rank_of(name * 3 + ".q_proj")

    started = time.monotonic()
    with pytest.raises(AdapterInvalid, match="adapter_config.json"):
        use()
    assert time.monotonic() - started < 2


def test_many_plain_patterns_are_fast_and_many_expressions_refused():
    names = [f"model.layers.{layer}.mlp.experts.{n}" for layer in range(50) for n in range(100)]
    table = PatternTable({name: at for at, name in enumerate(names, 1)}, "rank_pattern", MatchClock())
    started = time.monotonic()
    assert [table.get(name, 0) for name in names] == list(range(1, len(names) + 1))
    assert time.monotonic() - started < 2
    with pytest.raises(AdapterInvalid, match="rank_pattern"):
        PatternTable({f"{name}$": 1 for name in names}, "rank_pattern", MatchClock())
