"""Evaluation sets: what is read, what is refused by line, and what a check says."""

import json
from typing import Any

import pytest

from loraplex.errors import InvalidRequest
from loraplex.evaluation import schema_check
from loraplex.evaluation.check import Check
from loraplex.evaluation.evaluation_set import MAX_BYTES, MAX_CASES, read_set
from loraplex.evaluation.report import MAX_ANSWER_CHARS, MAX_FAILURES, Tally
from loraplex.evaluation.schema_check import SchemaCheck

GOOD = {"prompt": "2+2=", "check": {"exact": "4"}}
BOMB = "(a|a?)+$b"


def lines(*documents: Any) -> bytes:
    return b"\n".join(json.dumps(one).encode() if not isinstance(one, bytes) else one for one in documents)


def test_a_set_is_read():
    chat = {"messages": [{"role": "user", "content": "hi"}], "check": {"regex": "h"}, "max_tokens": 9, "name": "x"}
    cases = read_set(b"\xef\xbb\xbf" + lines(GOOD, b"", b"  ", chat) + b"\r\n")
    assert [(case.line, case.asked, case.max_tokens, case.check.kind) for case in cases] == [
        (1, "2+2=", None, "exact"),
        (4, "hi", 9, "regex"),
    ]
    assert cases[0].prompt == "2+2="
    assert cases[1].messages == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "65536 are taken"),
        (b"[" * 60_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([], "object"),
        ({"prompt": "a"}, "exactly one of 'exact'"),
        ({**GOOD, "promt": 1}, "'promt'"),
        ({"check": {"exact": "4"}}, "either"),
        ({**GOOD, "messages": []}, "either"),
        ({**GOOD, "prompt": ""}, "'prompt'"),
        ({**GOOD, "prompt": "\ud800"}, "'prompt'"),
        ({**GOOD, "max_tokens": 0}, "'max_tokens'"),
        ({**GOOD, "max_tokens": True}, "'max_tokens'"),
        ({**GOOD, "name": 3}, "'name'"),
        ({"messages": [{"role": "user"}], "check": {"exact": "4"}}, "'role'"),
        ({"messages": [{"role": "user", "content": None}], "check": {"exact": "4"}}, "'role'"),
        ({"messages": [], "check": {"exact": "4"}}, "'messages'"),
        ({**GOOD, "check": {"exact": "4", "regex": "4"}}, "exactly one"),
        ({**GOOD, "check": {"exact": 4}}, "check.exact"),
        ({**GOOD, "check": {"contains": []}}, "check.contains"),
        ({**GOOD, "check": {"contains": ["a", 1]}}, "check.contains"),
        ({**GOOD, "check": {"regex": "("}}, "check.regex: it does not compile"),
        ({**GOOD, "check": {"json_schema": 3}}, "check.json_schema: it is no JSON schema"),
        ({**GOOD, "check": {"json_schema": {"type": "nonsense"}}}, "check.json_schema: it is no JSON schema"),
        ({**GOOD, "check": {"json_schema": {"$ref": "http://127.0.0.1/x"}}}, "leads elsewhere"),
        ({**GOOD, "check": {"json_schema": {"properties": {"a": {"$ref": "other.json"}}}}}, "leads elsewhere"),
        ({**GOOD, "check": {"json_schema": {"allOf": [{"patternProperties": {}}]}}}, "patternProperties"),
        ({**GOOD, "check": {"json_schema": {"pattern": "("}}}, "does not compile"),
    ],
)
def test_a_refusal_names_the_line(second: Any, text: str):
    with pytest.raises(InvalidRequest) as refused:
        read_set(lines(GOOD, second))
    assert "line 2: " in refused.value.message
    assert text in refused.value.message
    assert (refused.value.code, refused.value.param) == ("invalid_evaluation", "body")
    assert len(refused.value.message) < 600


def test_a_set_has_limits():
    assert len(read_set(lines(*[GOOD] * MAX_CASES))) == MAX_CASES
    for data, text in (
        (lines(*[GOOD] * (MAX_CASES + 1)), "more than"),
        (b"\n" * (MAX_BYTES + 1), "bytes"),
        (b" \n", "no case"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            read_set(data)


@pytest.mark.parametrize(
    ("check", "passing", "failing"),
    [
        ({"exact": " yes\n"}, ["yes", "  yes "], ["Yes", "yes.", ""]),
        ({"exact": ""}, ["", " "], ["a"]),
        ({"contains": "b"}, ["abc"], ["ac", ""]),
        ({"contains": ["b", "c"]}, ["abc"], ["ab"]),
        ({"regex": "^[0-9]+$"}, ["42"], ["42 ", "a"]),
        ({"regex": "[0-9]"}, ["a 4 b"], ["a b"]),
        (
            {"json_schema": {"type": "object", "required": ["a"]}},
            [' {"a": 1}\n'],
            ['{"b": 1}', "{", "", "x {}", "[" * 9999],
        ),
        ({"json_schema": {"properties": {"a": {"pattern": "^x"}}}}, ['{"a": "xy"}', '{"a": 3}'], ['{"a": "yx"}']),
        ({"json_schema": {"multipleOf": 0.5}}, ["1.5"], ["NaN", "-Infinity", "1e400", "1.4"]),
        ({"json_schema": {"$defs": {"n": {"type": "number"}}, "$ref": "#/$defs/n"}}, ["3"], ['"3"']),
        (
            {"json_schema": {"$schema": "http://json-schema.org/draft-07/schema#", "items": {"type": "null"}}},
            ["[null]"],
            ["[1]"],
        ),
    ],
    ids=str,
)
def test_what_passes(check: Any, passing: list[str], failing: list[str]):
    made = Check(check)
    assert [made.problem(answer) for answer in passing] == [None] * len(passing)
    assert all(made.problem(answer) for answer in failing)


def test_no_check_lasts_for_ever(monkeypatch: pytest.MonkeyPatch):
    answer = "a" * 400 + "b"
    assert "longer" in (Check({"regex": BOMB}).problem(answer) or "")
    assert "longer" in (SchemaCheck({"pattern": BOMB}).problem(answer) or "")
    monkeypatch.setattr(schema_check, "SECONDS", 0.05)
    doubling = {"$defs": {"0": {"type": "string"}}, "$ref": "#/$defs/40"}
    for i in range(40):
        doubling["$defs"][str(i + 1)] = {"allOf": [{"$ref": f"#/$defs/{i}"}] * 2}
    assert "longer" in (SchemaCheck(doubling).problem("a") or "")


def test_a_reference_that_leads_nowhere_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schema_check, "SECONDS", 60.0)  # so that a slow machine reaches the depth before the deadline
    assert "too deep" in (SchemaCheck({"$ref": "#"}).problem(1) or "")
    assert "does not have" in (SchemaCheck({"$ref": "#/$defs/none"}).problem(1) or "")


def test_a_report_is_cut():
    tally = Tally("sql@3", "identity")
    cases = read_set(lines(*[{**GOOD, "prompt": "p" * 1000}] * 30))
    for case in reversed(cases):
        tally.add(case, "\0" + "x" * 10_000, "it is another text" if case.line > 2 else None)
    tally.add(cases[0], None, "the server failed")
    report = tally.to_json()
    assert (report["passed"], report["total"], report["errors"], report["failures_left_out"]) == (2, 31, 1, 9)
    assert report["pass_rate"] == pytest.approx(2 / 31, abs=1e-6)
    assert len(report["failures"]) == MAX_FAILURES
    assert [one["line"] for one in report["failures"][:3]] == [1, 3, 4]
    assert report["failures"][0]["answer"] is None
    assert len(report["failures"][1]["answer"]) == MAX_ANSWER_CHARS
    assert "\0" not in json.dumps(report)
