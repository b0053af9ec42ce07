"""The json skill: turn an order, a trip or a meeting told in English into one JSON object."""

from __future__ import annotations

import json
import re
from random import Random

from loraplex.demo.task import Task

NAMES = [
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Leo",
    "Maria", "Nils", "Olga", "Pedro", "Rosa", "Simon", "Tanja", "Viktor",
]  # fmt: skip
CITIES = [
    "Athens", "Berlin", "Dublin", "Lisbon", "London", "Madrid", "Oslo", "Paris", "Prague", "Rome", "Vienna",
    "Warsaw",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ITEMS = [
    "burgers", "coffees", "cookies", "juices", "pancakes", "pizzas", "salads", "sandwiches", "soups", "teas",
]  # fmt: skip
SIZES = ["small", "medium", "large"]
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}

# A template is a prompt and its grammar at once: its fields are drawn to compose and matched to solve.
TEMPLATES = {
    "order": (
        "{name} orders {count} {size} {item} for {day}",
        "please bring {count} {size} {item} to {name} on {day}",
    ),
    "trip": (
        "on {day} {name} takes the train to {to}, leaving {from}, seat {seat}",
        "{name} travels from {from} to {to} on {day} in seat {seat}",
    ),
    "meeting": (
        "{name} meets {guest} in {place} on {day} at {hour}",
        "on {day} at {hour} there is a meeting of {name} and {guest} in {place}",
    ),
}
FIELDS = {
    "order": ("name", "item", "size", "count", "day"),
    "trip": ("name", "from", "to", "day", "seat"),
    "meeting": ("name", "guest", "place", "day", "hour"),
}


def compose(rng: Random) -> str:
    """Draw a kind, one of its templates, and its fields: two people or cities of one prompt differ."""
    kind = rng.choice(list(TEMPLATES))
    name, guest = rng.sample(NAMES, 2)
    start, to = rng.sample(CITIES, 2)
    fields = {
        "name": name, "guest": guest, "from": start, "to": to, "place": to, "day": rng.choice(DAYS),
        "item": rng.choice(ITEMS), "size": rng.choice(SIZES), "count": rng.choice(list(NUMBERS)),
        "seat": rng.randint(10, 99), "hour": rng.randint(8, 19),
    }  # fmt: skip
    return rng.choice(TEMPLATES[kind]).format_map(fields)


def solve(prompt: str) -> str:
    """The JSON object for a prompt. Raises ValueError when no template fits."""
    for kind, templates in TEMPLATES.items():
        for template in templates:
            match = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>\\w+)", template), prompt)
            if match:
                values = {field: _value(field, match[field]) for field in FIELDS[kind]}
                return json.dumps({"type": kind, **values})
    raise ValueError(f"not a json prompt: {prompt!r}")


def _value(field: str, text: str) -> str | int:
    if field == "count":
        return NUMBERS[text]
    return int(text) if field in ("seat", "hour") else text


JSON = Task("json", "turns an order, a trip or a meeting into a JSON object", compose, solve)
