"""`loraplex pull`."""

import json

import pytest
from test_cli import ROOT, Served, assert_refused, inside, served  # noqa: F401

FILES = ("adapter_config.json", "adapter_model.safetensors")


def test_pull(served: Served, inside, tmp_path):  # noqa: F811
    env = {"LORAPLEX_URL": served.url}
    upper = ROOT / "adapters" / "upper"
    inside("push", ROOT / "adapters" / "reverse", "--name", "draft", **env)
    inside("push", upper, "--name", "draft", **env)
    out = tmp_path / "new" / "upper"
    assert inside("pull", "draft", out, **env).stdout == f"draft@2 -> {out}\n"
    assert {name: (out / name).read_bytes() for name in FILES} == {n: (upper / n).read_bytes() for n in FILES}
    assert [path.name for path in out.parent.iterdir()] == ["upper"], "no temporary folder is left"
    (tmp_path / "empty").mkdir()
    reply = json.loads(inside("pull", "draft", "--version", 1, tmp_path / "empty", "--json", **env).stdout)
    assert reply["id"] == "draft@1"
    assert (tmp_path / "empty" / FILES[1]).read_bytes() == (ROOT / "adapters" / "reverse" / FILES[1]).read_bytes()
    assert_refused(inside("pull", "draft", out, **env), "is there already", code=2)
    assert_refused(inside("pull", "draft@1", tmp_path / "x", "--version", 1, **env), "'draft@1'", "--version", code=2)
    assert_refused(inside("pull", "nobody", tmp_path / "x", **env), "nobody")
    assert not (tmp_path / "x").exists()
    inside("rm", "draft", **env)


def test_a_pull_that_is_not_the_digest(served: Served, inside, tmp_path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr("loraplex.cli.taking.adapter_digest", lambda *sums: "0" * 64)
    refused = inside("pull", "upper", tmp_path / "x", LORAPLEX_URL=served.url)
    assert_refused(refused, "its digest differs", code=1)
    assert not list(tmp_path.glob("*x*"))
