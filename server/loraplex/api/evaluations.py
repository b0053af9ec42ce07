"""/v1/routes/{alias}/evaluation: the evaluation set of a route, its runs, and what each target has reached.

The set is sent as JSON objects, one a line, whatever the content type. Its `ETag` is its own revision, not the route's.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from loraplex.api.openai import TheService
from loraplex.api.routes import Caller, Expected
from loraplex.evaluation.evaluation_set import MAX_BYTES
from loraplex.lora.evaluation_book import Result, StoredRun, StoredSet
from loraplex.routing.names import validate_name
from loraplex.routing.route import Gate
from loraplex.service import Service
from loraplex.serving.evaluating import MAX_TARGETS, Standing
from loraplex.serving.gating import why_closed

MAX_BODY_BYTES = MAX_BYTES + 1024
"""A little more than a set may have: then the refusal says how large it may be."""
LINES = "application/jsonl"

router = APIRouter(prefix="/v1/routes/{alias}/evaluation")


def alias_of(alias: str) -> str:
    return validate_name(alias)


Alias = Annotated[str, Depends(alias_of)]


@router.put("")
async def put_set(alias: Alias, request: Request, service: TheService, who: Caller, expected: Expected) -> Response:
    """Store the set; what targets have passed counts no longer, unless it is the same."""
    stored = await service.evaluations.put(alias, await request.body(), who=who, expected=expected)
    return JSONResponse(_describe_set(stored), headers=_etag(stored))


@router.get("")
async def get_set(alias: Alias, service: TheService) -> Response:
    """The set's facts, how each target of the route stands, and the latest run."""
    standing = await service.evaluations.standing(alias)
    return JSONResponse(_describe(service, standing), headers=_etag(standing.stored))


@router.get("/lines")
async def get_lines(alias: Alias, service: TheService) -> Response:
    """The set as it was sent."""
    stored = await service.evaluations.get(alias)
    return Response(stored.content, media_type=LINES, headers=_etag(stored))


@router.delete("")
async def delete_set(alias: Alias, service: TheService, who: Caller, expected: Expected) -> dict[str, Any]:
    """Forget the set. A gate is then closed to everything."""
    await service.evaluations.delete(alias, who=who, expected=expected)
    return {"alias": alias, "deleted": True}


class RunRequest(BaseModel):
    """`targets` None: all of the route's."""

    model_config = ConfigDict(extra="forbid")

    targets: (
        Annotated[
            list[Annotated[str, Field(max_length=1024)]],
            Field(min_length=1, max_length=MAX_TARGETS, fail_fast=True),
        ]
        | None
    ) = None


@router.post("/runs")
async def start_run(alias: Alias, service: TheService, who: Caller, body: RunRequest | None = None) -> Response:
    """Begin a run; 202, and GET …/runs/latest tells how far it is."""
    run = await service.evaluations.start(alias, None if body is None else body.targets, who=who)
    return JSONResponse(describe_run(run), 202)


@router.get("/runs")
async def list_runs(alias: Alias, service: TheService) -> dict[str, Any]:
    """The last runs, the latest first, without their reports."""
    found = await service.evaluations.runs(alias)
    return {"object": "list", "data": [describe_run(run) for run in found], "total": len(found)}


@router.get("/runs/{run_id}")
async def get_run(alias: Alias, run_id: str, service: TheService) -> dict[str, Any]:
    """A run with its report; `latest` is the latest."""
    return describe_run(await service.evaluations.run(alias, None if run_id == "latest" else run_id))


@router.delete("/runs/{run_id}")
async def cancel_run(alias: Alias, run_id: str, service: TheService) -> dict[str, Any]:
    """End a run; one that has ended stays as it is."""
    return describe_run(await service.evaluations.cancel(alias, run_id))


def describe_run(run: StoredRun) -> dict[str, Any]:
    return {
        "id": run.run_id,
        "object": "evaluation_run",
        "alias": run.alias,
        "state": run.state,
        "set_revision": run.set_revision,
        "targets": list(run.targets),
        "done": run.done,
        "total": run.total,
        "who": run.who,
        "started": run.started_at.isoformat(timespec="milliseconds"),
        "ended": None if run.ended_at is None else run.ended_at.isoformat(timespec="milliseconds"),
        "report": run.report,
    }


def _describe_set(stored: StoredSet) -> dict[str, Any]:
    return {
        "alias": stored.alias,
        "object": "evaluation_set",
        "revision": stored.revision,
        "cases": stored.num_cases,
        "bytes": len(stored.content),
        "digest": stored.digest,
        "changed": stored.at.isoformat(timespec="milliseconds"),
        "who": stored.who,
    }


def _describe(service: Service, standing: Standing) -> dict[str, Any]:
    route = standing.live.route
    shares = zip(route.targets, service.routes.shares(route), strict=True)
    return {
        **_describe_set(standing.stored),
        "gate": None if route.gate is None else {"min_pass": route.gate.min_pass},
        "targets": [
            {"model": target.model, "share": round(share, 6), **_reached(route.gate, standing.results, target.model)}
            for target, share in shares
        ],
        "run": None if standing.run is None else describe_run(standing.run),
    }


def _reached(gate: Gate | None, results: Mapping[str, Result | None], model: str) -> dict[str, Any]:
    """In the set as it is now. `closed`: why the gate is closed to it; null where it is open, or there is none."""
    result = results[model]
    return {
        "passed": None if result is None else result.passed,
        "total": None if result is None else result.total,
        "pass_rate": None if result is None else round(result.rate, 6),
        "closed": None if gate is None else why_closed(gate, result),
    }


def _etag(stored: StoredSet) -> dict[str, str]:
    return {"ETag": f'"{stored.revision}"'}
