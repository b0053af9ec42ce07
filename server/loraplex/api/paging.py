"""Offset and Limit: the query parameters of every list that comes in pages."""

from typing import Annotated

from fastapi import Query

Offset = Annotated[int, Query(ge=0, lt=2**31)]
Limit = Annotated[int, Query(ge=1, le=1000)]
