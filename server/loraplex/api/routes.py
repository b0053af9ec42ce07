"""/v1/routes: aliases that are policies: set, look, ramp, promote, roll back, delete; who did it, and when.

A reply's `ETag` is the revision of the route. A change with `If-Match` happens only to that revision, and one with
`If-None-Match: *` only where there is no route (else 412).
"""

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from loraplex.api.adapters import list_events
from loraplex.api.auth import caller_of
from loraplex.api.openai import TheService
from loraplex.api.paging import Limit, Offset
from loraplex.errors import InvalidRequest
from loraplex.routing.document import document_of
from loraplex.routing.names import validate_name
from loraplex.routing.observed import WINDOW, Observed, quantile
from loraplex.service import Service
from loraplex.serving.routes import Live

router = APIRouter(prefix="/v1/routes")

Seconds = Annotated[float, Query(ge=10, le=WINDOW)]
Document = Annotated[Any, Body()]
_ETAG = re.compile(r'(?:W/)?"?([0-9]{1,9})"?')


def expected_of(request: Request) -> int | None:
    """The revision that the caller has seen; 0: there is to be none; None: the caller does not say."""
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match is not None and none_match.strip() == "*" and match is None:
        return 0
    found = None if match is None else _ETAG.fullmatch(match.strip())
    if none_match is not None or (match is not None and found is None):
        raise InvalidRequest(
            "Send If-Match with the ETag of the route as it was shown, or If-None-Match: * for a new route.",
            param="if-match",
        )
    return None if found is None else int(found[1])


Expected = Annotated[int | None, Depends(expected_of)]
Caller = Annotated[str, Depends(caller_of)]


@router.get("")
async def list_routes(service: TheService) -> dict[str, Any]:
    """All routes by alias, as they are written."""
    found = await asyncio.to_thread(service.routes.all)
    return {"object": "list", "data": [describe_route(service, live) for live in found], "total": len(found)}


@router.get("/{alias}")
async def get_route(alias: str, service: TheService, window: Seconds = 300.0) -> Response:
    """The route, and what this process saw of each target in the last `window` seconds."""
    live = await asyncio.to_thread(service.routes.get, validate_name(alias))
    return _reply(
        service,
        live,
        200,
        {
            "window": window,
            "observed": _observed(service, live, window),
            "observed_shadows": [
                {"model": model, "dropped": one.dropped, **describe_observed(one)}
                for model, one in service.routes.seen_shadows(live.route, window).items()
            ],
        },
    )


@router.put("/{alias}")
async def put_route(alias: str, document: Document, service: TheService, who: Caller, expected: Expected) -> Response:
    """Make the alias mean what the document says; 201 when it was not there."""
    before = await asyncio.to_thread(service.routes.find, validate_name(alias))
    live = await asyncio.to_thread(service.routes.put, alias, document, who=who, expected=expected)
    return _reply(service, live, 201 if before is None else 200)


@router.delete("/{alias}")
async def delete_route(alias: str, service: TheService, who: Caller, expected: Expected) -> dict[str, Any]:
    """Forget the alias. Running requests go on."""
    gone = await asyncio.to_thread(service.routes.delete, validate_name(alias), who=who, expected=expected)
    return {"alias": gone.alias, "deleted": True, "revision": gone.revision}


@router.post("/{alias}/ramp")
async def ramp(alias: str, document: Document, service: TheService, who: Caller, expected: Expected) -> Response:
    """Start a ramp now: target, steps in per cent, seconds for each (`every`)."""
    live = await asyncio.to_thread(service.routes.ramp, validate_name(alias), document, who=who, expected=expected)
    return _reply(service, live, 200)


class PromoteRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    target: Annotated[str, Field(max_length=1024)]


@router.post("/{alias}/promote")
async def promote(alias: str, body: PromoteRequest, service: TheService, who: Caller, expected: Expected) -> Response:
    """Send everything to one target, but what rules lead elsewhere."""
    change = service.routes.promote
    live = await asyncio.to_thread(change, validate_name(alias), body.target, who=who, expected=expected)
    return _reply(service, live, 200)


class RouteRollbackRequest(BaseModel):
    """`revision` None: the one before what holds now."""

    model_config = ConfigDict(extra="forbid")

    revision: int | None = Field(None, ge=1, lt=2**31, strict=True)


@router.post("/{alias}/rollback")
async def roll_back_route(
    alias: str, service: TheService, who: Caller, expected: Expected, body: RouteRollbackRequest | None = None
) -> Response:
    """Make an earlier revision hold again."""
    change, to = service.routes.rollback, body.revision if body else None
    live = await asyncio.to_thread(change, validate_name(alias), to, who=who, expected=expected)
    return _reply(service, live, 200)


@router.get("/{alias}/history")
async def route_history(alias: str, service: TheService, offset: Offset = 0, limit: Limit = 100) -> dict[str, Any]:
    """The changes of the alias, deleted or not, latest first, each with the whole document before and since."""
    return await list_events(service, validate_name(alias), offset, limit)


def _reply(service: Service, live: Live, status: int, more: dict[str, Any] | None = None) -> Response:
    etag = {"ETag": f'"{live.revision.revision}"'}
    return JSONResponse({**describe_route(service, live), **(more or {})}, status, etag)


def describe_route(service: Service, live: Live) -> dict[str, Any]:
    """The document, with the shares that hold now beside the targets."""
    revision, route = live.revision, live.route
    shares = zip(route.targets, service.routes.shares(route), strict=True)
    return {
        "alias": route.alias,
        "object": "route",
        "revision": revision.revision,
        "changed": revision.at.isoformat(timespec="milliseconds"),
        "who": revision.who,
        **document_of(route),
        "shares": {target.model: round(share, 6) for target, share in shares},
    }


def _observed(service: Service, live: Live, window: float) -> list[dict[str, Any]]:
    seen = service.routes.seen(live.route, window)
    drawn = sum(one.drawn for one in seen.values())
    shares = service.routes.shares(live.route)
    return [
        {
            "model": model,
            "desired_share": round(share, 6),
            "observed_share": round(one.drawn / drawn, 6) if drawn else None,
            "running": service.routes.arm(live.route.alias, model).num_running,
            **describe_observed(one),
        }
        for (model, one), share in zip(seen.items(), shares, strict=True)
    ]


def describe_observed(one: Observed) -> dict[str, Any]:
    """Counts, and times in seconds."""
    return {
        "requests": one.drawn + one.ruled,
        "by_rule": one.ruled,
        "answered": one.answered,
        "failed": one.failed,
        "non_finite": one.non_finite,
        "aborted": one.aborted,
        "unavailable": one.unavailable,
        "over_limit": one.over_limit,
        "error_rate": round(one.error_rate, 6),
        "ttft": _times(one.ttft),
        "inter_token": _times(one.between),
    }


def _times(times: Any) -> dict[str, float | None]:
    return {"p50": _rounded(quantile(times, 0.5)), "p95": _rounded(quantile(times, 0.95))}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
