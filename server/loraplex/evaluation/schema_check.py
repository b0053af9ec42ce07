"""SchemaCheck: whether a value fits a JSON schema, within bounds that a stranger's schema cannot leave.

jsonschema fetches what a `$ref` to elsewhere names, matches `pattern` without a limit, and follows references as long
as they last. So references stay within the schema, `pattern` has a limit, `patternProperties` is refused, and every
keyword looks at the clock.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError, validators
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from loraplex.errors import InvalidRequest

SECONDS = 0.5
PATTERN_SECONDS = 0.05
MAX_DEPTH = 64
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


class SchemaCheck:
    """Raises InvalidRequest for what is no schema, or not one that can be checked here. Not for several threads."""

    def __init__(self, schema: Any):
        if not isinstance(schema, dict):
            raise InvalidRequest("it is no JSON schema: that is a JSON object")
        _look_through(schema, 0)
        kind = validators.validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path))
            raise InvalidRequest(f"it is no JSON schema: {error.message[:160]} (at {where[:80]!r})") from error
        except RecursionError as error:
            raise InvalidRequest("it is nested too deeply") from error
        self._deadline = 0.0
        keywords = {name: self._bounded(check) for name, check in kind.VALIDATORS.items()}
        keywords["pattern"] = self._pattern
        bounded: Callable[..., Validator] = validators.extend(kind, keywords)
        self._validator = bounded(schema, registry=Registry())

    def problem(self, value: Any) -> str | None:
        """Why `value` does not fit; None: it does."""
        self._deadline = time.monotonic() + SECONDS
        try:
            error = best_match(self._validator.iter_errors(value))
        except TimeoutError:
            return f"checking it took longer than {SECONDS:g} s"
        except RecursionError:
            return "checking it leads too deep"
        except Unresolvable as error:
            return f"the schema refers to what it does not have: {str(error)[:160]}"
        except Exception as error:  # jsonschema's arithmetic has limits that it does not name, as 1e400 % 0.1
            return f"it cannot be checked ({type(error).__name__})"
        if error is None:
            return None
        where = "/".join(map(str, error.absolute_path))
        return f"{error.message[:200]} (at {where[:80]!r})" if where else error.message[:200]

    def _bounded(self, check: Callable[..., Any]) -> Callable[..., Iterator[ValidationError]]:
        def bounded(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            if time.monotonic() > self._deadline:
                raise TimeoutError
            yield from check(validator, value, instance, schema) or ()

        return bounded

    def _pattern(self, validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and regex.search(pattern, instance, timeout=PATTERN_SECONDS) is None:
            yield ValidationError(f"{instance[:80]!r} does not match {pattern[:80]!r}")


def _look_through(schema: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(schema, list):
        for one in schema:
            _look_through(one, depth + 1)
    if not isinstance(schema, dict):
        return
    if "patternProperties" in schema:
        raise InvalidRequest("it uses 'patternProperties', which this server does not check; name the properties")
    for name in _REFERENCES:
        if isinstance(schema.get(name), str) and not schema[name].startswith("#"):
            raise InvalidRequest(f"its {name} {schema[name][:80]!r} leads elsewhere; put what it names under '$defs'")
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise InvalidRequest(f"its pattern {pattern[:80]!r} does not compile ({str(error)[:80]})") from error
    for one in schema.values():
        _look_through(one, depth + 1)
