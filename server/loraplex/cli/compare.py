"""`loraplex compare`: one prompt over several models of a running server."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loraplex.cli.client import request
from loraplex.cli.output import Json, console, print_json


def compare(
    prompt: Annotated[str, typer.Argument(help="What all of them are asked.")],
    models: Annotated[list[str], typer.Option("-m", "--model", help="A model, as in a request; 2 to 16 of them.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user's message, through each chat template.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="At most so many. [default: as in a request]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy. [default: as in a request]")] = None,
    seed: Annotated[int | None, typer.Option(help="The same for all of them.")] = None,
    json_output: Json = False,
) -> None:
    """Ask several models the same in one batch, and score each text under all of them."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in sampling.items() if value is not None}
    reply = request("POST", "/v1/compare", json={"targets": models, **asked, **given})
    if json_output:
        print_json(reply)
        return
    console().print(_texts(reply), _scores(reply))


def _texts(reply: dict[str, Any]) -> Table:
    table = Table("model", "text", "tokens", "ended", f"nats from {reply['base']}")
    for answer in reply["answers"]:
        name = Text(answer["model"] or answer["target"])
        if answer["error"] is not None:
            table.add_row(name, Text(answer["error"]["message"], style="red"), "", "failed", "")
            continue
        nats = answer["divergence"]
        far = "" if nats is None else f"{nats['mean']:.4g} (max {nats['max']:.4g})"
        table.add_row(name, Text(answer["text"]), str(answer["tokens"]), answer["finish_reason"], far)
    return table


def _scores(reply: dict[str, Any]) -> Table:
    """A row a text, a column a scorer."""
    found = reply["logprobs"]
    title = "ln probability of each text under each model, and per token"
    table = Table("text of", *map(escape, found["scorers"]), title=title, title_justify="left")
    for answer, sums, each in zip(reply["answers"], found["sum"], found["per_token"], strict=True):
        if answer["error"] is None:
            cells = [_cell(total, mean) for total, mean in zip(sums, each, strict=True)]
            table.add_row(Text(answer["model"]), *cells)
    return table


def _cell(total: float | None, mean: float | None) -> str:
    if total is None:
        return "-"
    return f"{total:z.2f}" if mean is None else f"{total:z.2f} ({mean:z.3f})"
