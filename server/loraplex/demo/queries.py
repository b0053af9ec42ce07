"""The sql skill: turn a question about one of four tables into a SELECT."""

from __future__ import annotations

import re
from random import Random

from loraplex.demo.task import Task

# Columns with values hold text and are compared by `is`; those without hold numbers.
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "products": {
        "brand": ("acme", "nova", "orion"),
        "color": ("black", "red", "white"),
        "price": (),
        "stock": (),
    },
    "movies": {
        "title": ("alien", "casablanca", "jaws"),
        "genre": ("comedy", "drama", "horror"),
        "year": (),
        "rating": (),
    },
    "employees": {
        "name": ("adams", "baker", "clark"),
        "team": ("design", "legal", "sales"),
        "salary": (),
        "age": (),
    },
    "cities": {
        "country": ("france", "japan", "kenya"),
        "climate": ("dry", "mild", "tropical"),
        "area": (),
        "population": (),
    },
}
OPENINGS = ("give me", "show", "list")
OPERATORS = {"is": "=", "is less than": "<", "is more than": ">", "is at least": ">="}
DIRECTIONS = {"ascending": "ASC", "descending": "DESC"}

_QUESTION = re.compile(
    r"(?:give me|show|list|count) (?:the (?P<columns>\w+(?: and \w+)?) of )?all (?P<table>\w+)"
    r"(?: whose (?P<column>\w+) (?P<operator>is(?: less than| more than| at least)?) (?P<value>\w+))?"
    r"(?: sorted by (?P<key>\w+) (?P<direction>ascending|descending))?"
    r"(?: limit (?P<limit>\d))?"
)


def compose(rng: Random) -> str:
    """Draw a table, one or two columns or a count, a condition, and sometimes an order and a limit."""
    table = rng.choice(list(TABLES))
    columns = list(TABLES[table])
    counts = rng.random() < 0.15
    where = f" whose {_condition(rng, table)}" if counts or rng.random() < 0.75 else ""
    if counts:
        return f"count all {table}{where}"
    wanted = " and ".join(rng.sample(columns, rng.randint(1, 2)))
    order = f" sorted by {rng.choice(columns)} {rng.choice(list(DIRECTIONS))}" if rng.random() < 0.35 else ""
    limit = f" limit {rng.randint(2, 9)}" if rng.random() < 0.35 else ""
    return f"{rng.choice(OPENINGS)} the {wanted} of all {table}{where}{order}{limit}"


def _condition(rng: Random, table: str) -> str:
    column, values = rng.choice(list(TABLES[table].items()))
    if values:
        return f"{column} is {rng.choice(values)}"
    return f"{column} {rng.choice(list(OPERATORS)[1:])} {rng.randint(10, 999)}"


def solve(prompt: str) -> str:
    """The SELECT for a question. Raises ValueError when it is none."""
    match = _QUESTION.fullmatch(prompt)
    if match is None or match["table"] not in TABLES:
        raise ValueError(f"not an sql prompt: {prompt!r}")
    columns = match["columns"].replace(" and ", ", ") if match["columns"] else "COUNT(*)"
    query = f"SELECT {columns} FROM {match['table']}"
    if match["column"]:
        value = match["value"] if match["value"].isdigit() else f"'{match['value']}'"
        query += f" WHERE {match['column']} {OPERATORS[match['operator']]} {value}"
    if match["key"]:
        query += f" ORDER BY {match['key']} {DIRECTIONS[match['direction']]}"
    if match["limit"]:
        query += f" LIMIT {match['limit']}"
    return query + ";"


SQL = Task("sql", "turns a question about a table into a SELECT", compose, solve)
