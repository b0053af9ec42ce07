"""Pins: which adapters stay in RAM."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pins",
        sa.Column("base_fingerprint", sa.String(128), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False, autoincrement=False),
        sa.PrimaryKeyConstraint("base_fingerprint", "name", "version", name="pk_pins"),
        sa.ForeignKeyConstraint(["name"], ["adapters.name"], name="fk_pins_name_adapters"),
    )


def downgrade() -> None:
    op.drop_table("pins")
