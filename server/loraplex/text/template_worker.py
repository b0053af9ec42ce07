"""The program of a template worker: renders chat templates that adapters bring. Runs confined, in a process of its own.

It renders with transformers' own `render_jinja_template`, so results equal `apply_chat_template`. That module needs
little of transformers, and importing all of it takes six times as long, so its siblings are put in by hand; if that
fails with some release, all of it is imported. Imports nothing heavy of loraplex.
"""

import importlib
import importlib.util
import logging
import socket
import sys
import types
from pathlib import Path
from typing import Any

from loraplex.text.confinement import Confinement
from loraplex.text.frames import receive, send

_MAX_MESSAGE_CHARS = 500
# What jinja2 imports when it is first needed; later no file can be opened.
_LATE_IMPORTS = ("jinja2.debug", "jinja2.constants", "pprint", "textwrap", "jinja2.sandbox", "linecache", "traceback")
_SAMPLE = "{% for m in messages %}{{ m | tojson }}{{ strftime_now('%d %b %Y') }}{{ m | pprint }}{% endfor %}"


def main() -> None:
    connection = socket.socket(fileno=0)
    start = receive(connection, 1 << 20)
    worker = TemplateWorker(start["max_chars"])
    confinement = Confinement(start["memory_bytes"], start["cpu_seconds"])
    send(connection, {"ready": True})
    while (job := receive(connection, start["max_job_bytes"])) is not None:
        confinement.renew()
        answer = worker.answer(job)
        send(connection, answer)
        # What a template left behind must not become another one's lack.
        if answer.get("kind") == "memory" or confinement.growth > start["memory_bytes"] // 2:
            return


class TemplateWorker:
    def __init__(self, max_chars: int):
        self._max_chars = max_chars
        self._utils = load_renderer()
        self._jinja2 = importlib.import_module("jinja2")
        for name in _LATE_IMPORTS:
            importlib.import_module(name)
        for sample in (_SAMPLE, "{{ nothing.there }}", "{% broken"):
            self.answer({"source": sample, "messages": [{"role": "user", "content": "x"}], "special_tokens": {}})

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"text"}, or {"kind", "message"} of why there is none: syntax, security, raised, failed, long, memory."""
        exceptions = self._jinja2.exceptions
        try:
            if job.get("is_check"):
                self._refuse_others(job["source"])
            [text], _ = self._utils.render_jinja_template(
                conversations=[job["messages"]],
                chat_template=job["source"],
                add_generation_prompt=job.get("add_generation_prompt", False),
                continue_final_message=job.get("continue_final_message", False),
                **job["special_tokens"],
            )
        except MemoryError:
            return {"kind": "memory", "message": "it needs more memory than it may have"}
        except (exceptions.TemplateSyntaxError, SyntaxError) as error:
            line = getattr(error, "lineno", None)
            return _failure("syntax", f"{error}" + (f" (line {line})" if line else ""))
        except exceptions.SecurityError as error:
            return _failure("security", error)
        except exceptions.UndefinedError as error:
            return _failure("failed", error)
        except exceptions.TemplateError as error:
            return _failure("raised", error)
        except RecursionError:
            return _failure("failed", "it calls itself too deeply")
        except Exception as error:
            return _failure("failed", f"{type(error).__name__}: {error}")
        if len(text) > self._max_chars:
            return _failure("long", f"it renders more than {self._max_chars} characters")
        return {"text": text}

    def _refuse_others(self, source: str) -> None:
        nodes = self._jinja2.nodes
        environment = self._utils._compile_jinja_template(source).environment
        for node in environment.parse(source).find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            word = type(node).__name__.removeprefix("From").lower()
            raise self._jinja2.exceptions.TemplateSyntaxError(
                f"{{% {word} %}} names another template, and there is none", node.lineno
            )


def _failure(kind: str, why: object) -> dict[str, Any]:
    return {"kind": kind, "message": str(why)[:_MAX_MESSAGE_CHARS]}


def load_renderer() -> Any:
    """transformers.utils.chat_template_utils, without the rest of transformers where that can be."""
    name = "transformers.utils.chat_template_utils"
    before = set(sys.modules)
    try:
        _put_in_siblings()
        module = importlib.import_module(name)
        module.render_jinja_template([[{"role": "user", "content": "x"}]], chat_template="{{ messages }}")
        return module
    except Exception:
        for added in [module for module in sys.modules if module.startswith("transformers") and module not in before]:
            del sys.modules[added]
        return importlib.import_module(name)


def _put_in_siblings() -> None:
    spec = importlib.util.find_spec("transformers")  # finds, and does not import
    root = Path(spec.origin).parent  # type: ignore[union-attr,arg-type]
    package, utils = types.ModuleType("transformers"), types.ModuleType("transformers.utils")
    package.__path__, utils.__path__ = [str(root)], [str(root / "utils")]
    siblings = {
        "logging": {"get_logger": logging.getLogger},
        "import_utils": {
            "is_jinja_available": lambda: True,
            "is_torch_available": lambda: False,
            "is_vision_available": lambda: False,
        },
    }
    sys.modules |= {"transformers": package, "transformers.utils": utils}
    for name, members in siblings.items():
        module = types.ModuleType(f"transformers.utils.{name}")
        module.__dict__.update(members)
        sys.modules[module.__name__] = module
        setattr(utils, name, module)
