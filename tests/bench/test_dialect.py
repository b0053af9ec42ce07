"""What a request says, for servers that take more and less of the newer fields."""

from loraplex.bench.dialect import Dialect


def test_an_openai_server_is_asked_by_the_models_name():
    body = Dialect().body("sql", [1, 2], 3)
    assert body == {
        "model": "sql",
        "prompt": [1, 2],
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    assert Dialect(is_chat=True).body("sql", "hello", 3)["messages"] == [{"role": "user", "content": "hello"}]


def test_llama_cpp_is_asked_by_the_adapters_number():
    dialect = Dialect(lora_ids={"a": 0, "b": 1}, extra={"cache_prompt": False})
    body = dialect.body("b", [1], 1)
    assert body["lora"] == [{"id": 1, "scale": 1.0}]
    assert body["cache_prompt"] is False
    assert dialect.body("a", [1], 1)["lora"] == [{"id": 0, "scale": 1.0}]


def test_the_base_is_named_to_llama_cpp_too():
    """It applies every adapter to a request that names none."""
    dialect = Dialect(lora_ids={"a": 0, "b": 1})
    assert dialect.body("base", [1], 1)["lora"] == [{"id": 0, "scale": 0.0}]
    assert "lora" not in Dialect(lora_ids={}).body("base", [1], 1), "it has loaded none"


def test_lesser_dialects_keep_how_adapters_are_named():
    dialect = Dialect(lora_ids={"a": 0}, extra={"cache_prompt": False})
    bodies = [each.body("a", [1], 1) for each in dialect.lesser()]
    assert [("ignore_eos" in body, "stream_options" in body) for body in bodies] == [
        (True, True),
        (False, True),
        (False, False),
    ]
    assert all(body["lora"] == [{"id": 0, "scale": 1.0}] and body["cache_prompt"] is False for body in bodies)
