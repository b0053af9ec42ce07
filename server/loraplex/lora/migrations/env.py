"""Alembic's entry: run the steps on the connection that `Registry` hands over."""

from alembic import context

from loraplex.lora.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
