"""The tables of the registry. `migrations` makes them; a test compares the two."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

# A row a name, for ever: `last_version` only grows, so that a deleted version's number is never given again.
adapters = Table(
    "adapters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("last_version", Integer, nullable=False),
)

# A row a version, for ever; a deleted one keeps its row with state "deleted". Of a name's ready versions on one base
# the one with the highest precedence is what the name means (of equal ones the newest); 0: rolled back.
versions = Table(
    "versions",
    metadata,
    Column("name", String(64), ForeignKey("adapters.name"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("base_fingerprint", String(128), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("alpha", Float, nullable=False),
    Column("use_rslora", Boolean, nullable=False),
    Column("num_modules", Integer, nullable=False),
    Column("target_modules", JSON, nullable=False),
    Column("dtype", String(16), nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("num_values", BigInteger, nullable=False),
    Column("text_files", JSON, nullable=False, server_default="{}"),
    Column("profile", JSON(none_as_null=True), nullable=True),
    Column("precedence", Integer, nullable=False, server_default="0"),
    Column("report", JSON(none_as_null=True), nullable=True),
    Column("proof", JSON(none_as_null=True), nullable=True),
    Column("parent", String(64), nullable=True),
    Column("parent_version", Integer, nullable=True),
    Column("quarantine", JSON(none_as_null=True), nullable=True),
    Column("source", String(1024), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("deleted_at", DateTime(timezone=True), nullable=True),
    Index(None, "state", "name", "base_fingerprint", "precedence", "version"),
)

# A row a change, for ever, written in the change's own transaction. In the order of `id`: clocks jump.
events = Table(
    "events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("who", String(128), nullable=False),
    Column("action", String(32), nullable=False),
    Column("name", String(64), nullable=False),
    Column("version", Integer, nullable=True),
    Column("detail", JSON, nullable=False, server_default="{}"),
    Index(None, "name", "id"),
)

# A row a change of a route, for ever; the highest revision holds, and none with document NULL: the route was deleted.
# `origin` is the revision that first said what this one says: another one after a rollback, else its own. The alias has
# a row in `adapters`, too: whoever changes a name, as a route or as an adapter, locks it there.
routes = Table(
    "routes",
    metadata,
    Column("alias", String(64), ForeignKey("adapters.name"), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("origin", Integer, nullable=False),
    Column("document", JSON(none_as_null=True), nullable=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("who", String(128), nullable=False),
)

# A row an alias that ever had an evaluation set; `revision` only grows, content NULL: it was deleted.
evaluation_sets = Table(
    "evaluation_sets",
    metadata,
    Column("alias", String(64), ForeignKey("adapters.name"), primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("content", LargeBinary, nullable=True),
    Column("digest", String(64), nullable=False),
    Column("num_cases", Integer, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("who", String(128), nullable=False),
)

# A row a run, the last ones of each alias. `seen_at`: when the process that runs it last said so.
evaluation_runs = Table(
    "evaluation_runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("alias", String(64), ForeignKey("adapters.name"), nullable=False),
    Column("set_revision", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("targets", JSON, nullable=False),
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("who", String(128), nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("seen_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True), nullable=True),
    Column("report", JSON(none_as_null=True), nullable=True),
    Index(None, "alias", "started_at"),
)

# What a target reached at last. `identity`: of its files and scales on a base; another one is another target.
evaluation_results = Table(
    "evaluation_results",
    metadata,
    Column("alias", String(64), ForeignKey("adapters.name"), primary_key=True),
    Column("identity", String(64), primary_key=True),
    Column("set_revision", Integer, nullable=False),
    Column("model", String(1024), nullable=False),
    Column("passed", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("run_id", String(32), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)

# A row a wish that an adapter stay in RAM, on the servers of a base; version 0: whatever the name means.
pins = Table(
    "pins",
    metadata,
    Column("base_fingerprint", String(128), primary_key=True),
    Column("name", String(64), ForeignKey("adapters.name"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
)

# One row: what tells this registry from any other. A store remembers to which one its blobs belong.
identity = Table("identity", metadata, Column("id", String(32), primary_key=True))
