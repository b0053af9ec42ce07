"""Routes: every revision of every alias."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "routes",
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("origin", sa.Integer, nullable=False),
        sa.Column("document", sa.JSON, nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("alias", "revision", name="pk_routes"),
        sa.ForeignKeyConstraint(["alias"], ["adapters.name"], name="fk_routes_alias_adapters"),
    )


def downgrade() -> None:
    op.drop_table("routes")
