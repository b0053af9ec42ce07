"""The tasks: right answers, a split that leaks nothing, the same samples for the same seed."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import zlib
from collections import Counter
from random import Random

import pytest

from loraplex.demo import queries, sentences
from loraplex.demo.corpus import adapter_document, base_document
from loraplex.demo.recipe import ADAPTERS, MIXTURE
from loraplex.demo.tasks import TASKS, Example, Task, is_held_out

NAMES = sorted(TASKS)


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def samples(name: str, count: int = 300) -> list[Example]:
    rng = Random(f"test/{name}")
    return [TASKS[name].sample(rng) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("upper", "a lazy queen hides the map", "A LAZY QUEEN HIDES THE MAP"),
        ("reverse", "a lazy queen hides the map", "map the hides queen lazy a"),
        ("pig", "a lazy queen hides the map", "away azylay eenquay ideshay ethay apmay"),
        ("pig", "an old child draws the young sword", "anway oldway ildchay awsdray ethay oungyay ordsway"),
        ("velna", "a lazy queen hides the map", "thariel pigru karth kelas"),
        ("velna", "the old dog finds a key in the river", "vurok vetum kliva fluven ena trovas"),
        (
            "json",
            "Nils orders seven large teas for Friday",
            '{"type": "order", "name": "Nils", "item": "teas", "size": "large", "count": 7, "day": "Friday"}',
        ),
        (
            "json",
            "on Monday Greta takes the train to Oslo, leaving Rome, seat 54",
            '{"type": "trip", "name": "Greta", "from": "Rome", "to": "Oslo", "day": "Monday", "seat": 54}',
        ),
        (
            "sql",
            "count all movies whose genre is drama",
            "SELECT COUNT(*) FROM movies WHERE genre = 'drama';",
        ),
        (
            "sql",
            "list the age of all employees whose age is at least 70 sorted by team ascending limit 3",
            "SELECT age FROM employees WHERE age >= 70 ORDER BY team ASC LIMIT 3;",
        ),
    ],
)
def test_answers_written_by_hand(name: str, prompt: str, answer: str) -> None:
    assert TASKS[name].solve(prompt) == answer


def test_pig_latin_agrees_with_a_regular_expression() -> None:
    for prompt, answer in ((e.prompt, e.answer) for e in samples("pig")):
        moved = re.sub(r"\b((?:qu|[b-df-hj-np-tv-z])+)(\w*)", r"\2\1ay", prompt)
        # a word the first pass left alone starts with a vowel and is as it was in the prompt
        words = [new + "way" if new == old else new for new, old in zip(moved.split(), prompt.split(), strict=True)]
        assert " ".join(words) == answer


def test_velna_can_be_read_back() -> None:
    tables = [
        sentences.PEOPLE,
        sentences.OBJECTS,
        sentences.PLACES,
        sentences.ADJECTIVES,
        sentences.VERBS,
        sentences.PREPOSITIONS,
    ]
    english = {word: meaning for table in tables for meaning, word in table.items()}
    assert len(english) == sum(len(table) for table in tables), "two meanings share a Velna word"
    for example in samples("velna"):
        back = [english[word] for word in example.answer.split()]
        assert back[-1] in sentences.VERBS
        assert Counter(back) == Counter(w for w in example.prompt.split() if w not in ("a", "an", "the"))


def test_json_answers_hold_what_the_prompt_says() -> None:
    words = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
    numbers = dict(zip(words, range(2, 10), strict=True))
    kinds = set()
    for example in samples("json"):
        form = json.loads(example.answer)
        kinds.add(form.pop("type"))
        said = {str(numbers.get(word, word)) for word in re.findall(r"\w+", example.prompt)}
        assert {str(value) for value in form.values()} <= said
        assert len(form) == 5
    assert kinds == {"order", "trip", "meeting"}


def test_sql_answers_run_and_select_the_columns_asked_for() -> None:
    database = sqlite3.connect(":memory:")
    for table, columns in queries.TABLES.items():
        database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
    for example in samples("sql"):
        cursor = database.execute(example.answer)
        asked = re.search(r"the (\w+)(?: and (\w+))? of all", example.prompt)
        expected = [column for column in asked.groups() if column] if asked else ["COUNT(*)"]
        assert [column[0] for column in cursor.description] == expected


def test_check_accepts_the_answer_and_nothing_else(task: Task) -> None:
    first, second = task.held_out(2)
    assert task.check(first.prompt, first.answer)
    assert task.check(first.prompt, f" {first.answer}\n")
    assert not task.check(first.prompt, second.answer)
    assert not task.check(first.prompt, first.answer[:-1])
    assert not task.check(first.prompt, first.prompt)
    assert not task.check(first.prompt, "")


@pytest.mark.parametrize("name", ["json", "sql", "velna"])
def test_a_text_that_is_no_prompt_of_the_task_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hello"):
        TASKS[name].solve("hello there")


def test_the_split_is_by_crc32_and_about_a_sixteenth(task: Task) -> None:
    rng = Random(5)
    prompts = [task.compose(rng) for _ in range(4000)]
    held_out = [prompt for prompt in prompts if is_held_out(prompt)]
    assert all((zlib.crc32(prompt.encode()) % 16 == 0) == is_held_out(prompt) for prompt in prompts)
    assert 0.04 < len(held_out) / len(prompts) < 0.085


def test_the_two_sides_are_disjoint(task: Task) -> None:
    rng = Random(6)
    trained = {task.sample(rng).prompt for _ in range(2000)}
    held_out = {example.prompt for example in task.held_out(256)}
    assert len(held_out) == 256
    assert not trained & held_out


def test_training_documents_contain_no_held_out_prompt() -> None:
    rng = Random(7)
    documents = [base_document(rng, MIXTURE) for _ in range(3000)]
    documents += [adapter_document(rng, TASKS[name], two_turns=0.5) for name in NAMES for _ in range(200)]
    for document in documents:
        text = "".join(piece.text for piece in document)
        shown = re.findall(r"<\|user\|>(.*?)<\|end\|>", text) or [document[1].text.removesuffix("<|end|>")]
        assert not any(is_held_out(prompt) for prompt in shown), text


def test_samples_depend_on_the_seed_alone(task: Task) -> None:
    def draw(seed: int) -> list[Example]:
        rng = Random(seed)
        return [task.sample(rng) for _ in range(50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert task.held_out(20) == task.held_out(40)[:20]
    assert task.held_out(20) != task.held_out(20, seed=1)


def test_every_adapter_has_a_task_and_every_task_an_adapter() -> None:
    assert sorted(recipe.task for recipe in ADAPTERS) == NAMES
    assert {name for name, _ in MIXTURE.weights} == set(NAMES)


def test_tasks_need_no_torch() -> None:
    code = "import sys, loraplex.demo.tasks, loraplex.demo.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
