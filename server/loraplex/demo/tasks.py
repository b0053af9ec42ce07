"""All tasks of the demo, by name. Pure Python: no torch."""

from __future__ import annotations

from types import MappingProxyType

from loraplex.demo.forms import JSON
from loraplex.demo.queries import SQL
from loraplex.demo.sentences import PIG, REVERSE, UPPER, VELNA
from loraplex.demo.task import Example, Task, is_held_out

TASKS = MappingProxyType({task.name: task for task in (UPPER, REVERSE, PIG, JSON, SQL, VELNA)})

__all__ = ["TASKS", "Example", "Task", "is_held_out"]
