"""Which version another one stands on. Until now nothing was written to `parent`: it is the name of that version."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("parent_version", sa.Integer, nullable=True))


def downgrade() -> None:
    op.drop_column("versions", "parent_version")
