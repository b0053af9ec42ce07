"""What a name means after a rollback, who changed what and when, what checks found, and the registry's own identity."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_CURRENT = ("state", "name", "base_fingerprint", "precedence", "version")


def upgrade() -> None:
    op.add_column("versions", sa.Column("precedence", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE versions SET precedence = version")  # until now the newest was what a name meant
    op.add_column("versions", sa.Column("report", sa.JSON, nullable=True))
    op.add_column("versions", sa.Column("proof", sa.JSON, nullable=True))
    op.add_column("versions", sa.Column("parent", sa.String(64), nullable=True))
    op.drop_index("ix_versions_state_name_version", "versions")
    op.create_index("ix_versions_" + "_".join(_CURRENT), "versions", list(_CURRENT))
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.String(128), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=True),
        sa.Column("detail", sa.JSON, nullable=False, server_default="{}"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_name_id", "events", ["name", "id"])
    identity = op.create_table(
        "identity", sa.Column("id", sa.String(32), nullable=False), sa.PrimaryKeyConstraint("id", name="pk_identity")
    )
    op.bulk_insert(identity, [{"id": uuid.uuid4().hex}])


def downgrade() -> None:
    op.drop_table("identity")
    op.drop_table("events")
    op.drop_index("ix_versions_" + "_".join(_CURRENT), "versions")
    op.create_index("ix_versions_state_name_version", "versions", ["state", "name", "version"])
    for column in ("parent", "proof", "report", "precedence"):
        op.drop_column("versions", column)
