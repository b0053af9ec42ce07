"""Evaluation sets of routes, their runs, and what each target reached."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evaluation_sets",
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("num_cases", sa.Integer, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("alias", name="pk_evaluation_sets"),
        sa.ForeignKeyConstraint(["alias"], ["adapters.name"], name="fk_evaluation_sets_alias_adapters"),
    )
    op.create_table(
        "evaluation_runs",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("set_revision", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("targets", sa.JSON, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("who", sa.String(128), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("report", sa.JSON, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_evaluation_runs"),
        sa.ForeignKeyConstraint(["alias"], ["adapters.name"], name="fk_evaluation_runs_alias_adapters"),
    )
    op.create_index("ix_evaluation_runs_alias_started_at", "evaluation_runs", ["alias", "started_at"])
    op.create_table(
        "evaluation_results",
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("identity", sa.String(64), nullable=False),
        sa.Column("set_revision", sa.Integer, nullable=False),
        sa.Column("model", sa.String(1024), nullable=False),
        sa.Column("passed", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("run_id", sa.String(32), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("alias", "identity", name="pk_evaluation_results"),
        sa.ForeignKeyConstraint(["alias"], ["adapters.name"], name="fk_evaluation_results_alias_adapters"),
    )


def downgrade() -> None:
    op.drop_table("evaluation_results")
    op.drop_table("evaluation_runs")
    op.drop_table("evaluation_sets")
