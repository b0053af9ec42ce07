"""Names of modules by the layer."""

from loraplex.lora.module_names import group_by_layer


def grouped(*names: str) -> list[str]:
    return [name for name, _ in group_by_layer(names, str)]


def test_names_that_differ_in_their_layer_are_one_line():
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 2, 7, 9, 10)]
    assert grouped(*names) == ["model.layers.{0-2,7,9-10}.mlp.up_proj"]
    assert grouped(*reversed(names)) == ["model.layers.{0-2,7,9-10}.mlp.up_proj"]
    assert grouped("model.layers.3.mlp.up_proj") == ["model.layers.3.mlp.up_proj"]
    assert grouped("lm_head", "model.norm.weight", "h.1") == ["lm_head", "model.norm.weight", "h.1"]


def test_only_the_first_number_counts():
    assert grouped("a.0.b.0.c", "a.1.b.0.c", "a.0.b.1.c") == ["a.{0-1}.b.0.c", "a.0.b.1.c"]


def test_what_differs_otherwise_stays_apart():
    names = ["m.0.q", "m.1.q", "m.2.q"]
    ranks = dict(zip(names, (4, 8, 4), strict=True))
    groups = group_by_layer(names, str, lambda name: ranks[name])
    assert groups == [("m.{0,2}.q", ["m.0.q", "m.2.q"]), ("m.1.q", ["m.1.q"])]
