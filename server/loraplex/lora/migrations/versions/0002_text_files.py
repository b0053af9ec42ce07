"""The files of an adapter's text side, and its serving profile."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("text_files", sa.JSON, nullable=False, server_default="{}"))
    op.add_column("versions", sa.Column("profile", sa.JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("versions", "profile")
    op.drop_column("versions", "text_files")
