"""How values of a client's files are shown in messages: short, one line, printable."""


def shown(value: object, limit: int = 80) -> str:
    """`repr` of `value`, cut to `limit` characters, so that a message never echoes a whole upload."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(names: list[str], limit: int = 3) -> str:
    """The first `limit` of `names`, and how many more there are."""
    head = ", ".join(shown(name, 120) for name in names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"
