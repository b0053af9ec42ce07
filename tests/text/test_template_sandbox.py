"""The sandbox: what it renders equals transformers', what is hostile ends, and nobody else waits for it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from loraplex.errors import Overloaded
from loraplex.text import template_sandbox
from loraplex.text.child import Child, ChildDied
from loraplex.text.template_sandbox import WORKER, SandboxLimits, TemplateFailed, TemplateSandbox

QUICK = SandboxLimits(wall_seconds=1.5, cpu_seconds=1, memory_bytes=128 << 20, max_chars=1 << 20, pause_seconds=2)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
USER = [{"role": "user", "content": "  hi “you” <b>  "}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
LONGER = [*SYSTEM, {"role": "assistant", "content": "Hello. "}, {"role": "user", "content": "Well?", "name": None}]
BROKEN_ORDER = [*USER, *USER]
UNFINISHED = [*USER, {"role": "assistant", "content": "It is "}]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}"
    "}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}"""
WITH_TOOLS = """{%- if tools %}{{ tools | tojson(indent=2) }}{%- endif %}
{%- macro one(m) -%}<{{ m.role | upper }}>{{ m | tojson }}{{ m.name is defined }}{%- endmacro -%}
{%- for m in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}{{ one(m) }}{% endgeneration %}
{% endfor %}
{{ strftime_now("%Y") }} {{ dict(a=1) | items | list }} {{ messages | pprint | length }} {{ "a b c" | wordwrap(2) }}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "tools": WITH_TOOLS}


@pytest.fixture
async def sandbox() -> AsyncIterator[TemplateSandbox]:
    sandbox = TemplateSandbox(QUICK)
    yield sandbox
    await sandbox.close()
    assert [worker for worker in sandbox._workers if worker._child is not None] == []


def reference(source: str, messages: list[dict], **options) -> str | Exception:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=RustTokenizer(models.BPE()), **SPECIAL)
    tokenizer.chat_template = source
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        return error


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
async def test_it_renders_what_transformers_renders(sandbox: TemplateSandbox, source: str):
    compared = 0
    for messages in (USER, SYSTEM, LONGER, BROKEN_ORDER, UNFINISHED):
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            expected = reference(source, messages, **options)
            if isinstance(expected, str):
                assert await sandbox.render(source, messages, SPECIAL, **options) == expected
                compared += 1
            else:
                with pytest.raises(TemplateFailed) as failed:
                    await sandbox.render(source, messages, SPECIAL, **options)
                assert str(expected)[:400] in failed.value.message
                assert failed.value.kind in ("raised", "failed")
    assert compared >= 4


HOSTILE = {
    "endless nesting": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "limit"),
    "endless output": ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "limit"),
    "memory by repetition": ("{{ 'a' * 10**9 }}", "limit"),
    "memory by a filter": ("{{ 'a' | center(10**9) }}", "limit"),
    "memory by a format": ("{{ '{:>1000000000}'.format('a') }}", "limit"),
    "memory by doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "limit",
    ),
    "one long step": ("{{ (7 ** (7 ** 8)) % 3 }}", "limit"),
    "huge output": ("{{ 'ab' * (2 ** 20) }}", "limit"),
    "its class": ("{{ ''.__class__.__mro__ }}", "security"),
    "its globals": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "security"),
    "its own frame": ("{{ self._TemplateReference__context.eval_ctx }}", "security"),
    "by attribute filter": ("{{ (messages | attr('__class__')).__base__ }}", "security"),
    "by format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "security"),
    "changing its input": ("{{ messages.append(1) }}", "security"),
    "a dunder namespace": ("{{ namespace(__class__=1) }}", "security"),
    "include": ("{% include '/etc/passwd' %}", "syntax"),
    "import": ("{% import 'os' as os %}", "syntax"),
    "from import": ("{% from 'os' import system %}", "syntax"),
    "extends": ("{% extends 'x' %}", "syntax"),
    "open": ("{{ open('/etc/passwd').read() }}", "failed"),
    "endless recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "failed"),
    "deep brackets": ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "failed"),
    "deep blocks": ("{% if 1 %}" * 10_000 + "{% endif %}" * 10_000, "failed"),
    "many loops": ("{% for a in 'x' %}" * 30 + "{% endfor %}" * 30, "syntax"),
    "a long sum": ("{{ " + "+".join(["1"] * 20_000) + " }}", "failed"),
    "no end": ("{% if messages %}", "syntax"),
    "no filter": ("{{ messages | nofilter }}", "syntax"),
}


@pytest.mark.parametrize(("source", "kind"), HOSTILE.values(), ids=HOSTILE)
async def test_what_is_hostile_ends_by_name_and_the_next_is_served(sandbox: TemplateSandbox, source: str, kind: str):
    began = time.monotonic()
    with pytest.raises(TemplateFailed) as failed:
        await sandbox.render(source, USER, SPECIAL, is_check=True)
    assert failed.value.kind == kind, failed.value.message
    assert len(failed.value.message) < 1000
    assert time.monotonic() - began < 8
    assert await sandbox.render(CHATML, USER, SPECIAL) == reference(CHATML, USER, add_generation_prompt=True)


async def test_others_are_served_while_a_template_spins(sandbox: TemplateSandbox):
    await asyncio.gather(*(sandbox.render(CHATML + mark, USER, SPECIAL) for mark in "ab"))  # both workers run
    source, _ = HOSTILE["endless nesting"]
    started = time.monotonic()
    spinning = [asyncio.ensure_future(sandbox.render(source, USER, SPECIAL)) for _ in range(5)]
    await asyncio.sleep(0.05)
    slowest = 0.0
    served = 0
    while not all(one.done() for one in spinning):
        began = time.monotonic()
        await sandbox.render(CHATML, USER, SPECIAL)
        slowest = max(slowest, time.monotonic() - began)
        served += 1
    spun = time.monotonic() - started
    assert served > 20
    assert slowest < spun  # nobody waited for the template's end
    for one in spinning:  # the first ran into the limit, the others did not run at all
        assert isinstance(one.exception(), TemplateFailed)
    began = time.monotonic()
    with pytest.raises(TemplateFailed, match=f"not tried again for {QUICK.pause_seconds:g} s"):
        await sandbox.render(source, USER, SPECIAL)
    assert time.monotonic() - began < spun / 2  # it did not run
    await asyncio.sleep(QUICK.pause_seconds)
    with pytest.raises(TemplateFailed, match=r"processor time|longer than"):
        await sandbox.render(source, USER, SPECIAL)


async def test_who_was_served_longest_ago_comes_next(sandbox: TemplateSandbox):
    """Two floods and one request of a third template: it does not wait for their ends."""
    order: list[str] = []
    busy = "{% for i in range(3000) %}{% endfor %}"

    async def render(mark: str) -> None:
        await sandbox.render(busy + mark, USER, SPECIAL)
        order.append(mark)

    await asyncio.gather(*(render(mark) for mark in "abc" * 6))  # compiled everywhere
    order.clear()
    floods = [asyncio.ensure_future(render(mark)) for mark in "ab" * 30]
    await asyncio.sleep(0)
    await render("c")
    await asyncio.gather(*floods)
    assert order.index("c") < len(floods) // 2, "by arrival it would be the last"


async def test_too_many_for_one_template_are_turned_away(sandbox: TemplateSandbox, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_WAITING_PER_TEMPLATE", 3)
    replies = await asyncio.gather(
        *(sandbox.render(CHATML, USER, SPECIAL) for _ in range(8)), sandbox.render(LLAMA3, USER, SPECIAL),
        return_exceptions=True,
    )  # fmt: skip
    assert sum(isinstance(reply, Overloaded) for reply in replies) == 4
    assert isinstance(replies[-1], str)


async def test_a_client_that_leaves_frees_its_place(sandbox: TemplateSandbox):
    source, _ = HOSTILE["endless nesting"]
    running = asyncio.ensure_future(sandbox.render(source, USER, SPECIAL))
    waiting = asyncio.ensure_future(sandbox.render(source, USER, SPECIAL))
    await asyncio.sleep(0.3)
    for task in (running, waiting):
        task.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    assert await sandbox.render(CHATML, USER, SPECIAL)
    while sandbox._rendering:
        await asyncio.sleep(0.02)
    assert len(sandbox._idle) == 2
    assert sandbox._waiting == []
    assert sandbox._served == {}


async def test_a_killed_worker_is_replaced(sandbox: TemplateSandbox):
    for _ in range(2):
        assert await sandbox.render(CHATML, USER, SPECIAL)
        for worker in sandbox._workers:
            if worker._child is not None:
                os.kill(worker._child.pid, 9)
    assert await sandbox.render(CHATML, USER, SPECIAL)


async def test_memory_that_was_taken_is_given_back(sandbox: TemplateSandbox):
    """Templates that take much, one after the other, do not take it from each other."""
    for i in range(12):
        text = await sandbox.render(
            f"{{% set x = messages[0].role * (10 * 2**20) %}}{{{{ x | length }}}} {i}", USER, SPECIAL
        )
        assert text == f"{40 << 20} {i}"


async def test_what_is_under_way_ends_with_the_sandbox():
    sandbox = TemplateSandbox(SandboxLimits(wall_seconds=60, cpu_seconds=60))
    source, _ = HOSTILE["endless nesting"]
    tasks = [asyncio.ensure_future(sandbox.render(source, USER, SPECIAL)) for _ in range(2)]
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await sandbox.close()
    assert time.monotonic() - began < 5
    replies = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(reply, TemplateFailed | asyncio.CancelledError) for reply in replies)


def test_a_worker_can_open_nothing_and_knows_no_secrets(monkeypatch, tmp_path):
    """Were jinja2's sandbox to leak: the process has no environment, no descriptors, no room."""
    monkeypatch.setenv("LORAPLEX_API_KEY", "a-secret-key")
    secret = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(secret, True)
    limits = {"memory_bytes": 64 << 20, "cpu_seconds": 5, "max_chars": 100, "max_job_bytes": 1 << 20}
    child = Child(WORKER, limits)
    try:
        child.prepare()
        folder = f"/proc/{child.pid}"
        if os.path.isdir(folder):
            with open(f"{folder}/environ", "rb") as file:
                assert b"secret" not in file.read()
            with open(f"{folder}/limits") as file:
                rows = {line[:26].strip(): line[26:].split() for line in file}
            descriptors = os.listdir(f"{folder}/fd")
            assert rows["Max open files"][0] == str(max(map(int, descriptors)) + 1)
            assert len(descriptors) == 4
            assert rows["Max file size"][0] == rows["Max core file size"][0] == rows["Max processes"][0] == "0"
            assert int(rows["Max address space"][0]) < 1 << 30
        with pytest.raises(ChildDied):
            child.exchange({"source": "x" * (2 << 20)}, 5, 1 << 20)  # a job beyond its limit ends it
    finally:
        child.close()
        os.close(secret)
