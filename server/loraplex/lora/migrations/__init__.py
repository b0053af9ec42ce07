"""The steps by which the registry's tables came about, run by `Registry` when it opens (Alembic)."""
