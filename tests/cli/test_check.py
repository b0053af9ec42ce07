"""`loraplex check`: an adapter against a base, without a server."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import ROOT, Done, assert_refused, inside, run  # noqa: F401  the fixture

BASE = ROOT / "server" / "loraplex" / "demo" / "base"


def test_what_a_server_would_say(inside):  # noqa: F811
    done: Done = inside("check", ROOT / "adapters" / "velna", "--base", BASE)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("velna fits", "lm_head", "embedding, output head", "BF16"))
    assert "proven" not in done.stdout
    report = json.loads(inside("check", ROOT / "adapters" / "json", "--base", BASE, "--json").stdout)
    assert report["proof"] is None
    assert report["report"]["features"] == ["rsLoRA"]
    assert [row["count"] for row in report["report"]["modules"]] == [4, 4, 4, 4]


@pytest.mark.parametrize("name", ["upper", "pig", "velna"])
def test_the_weights_are_read_only_where_they_are_needed(name: str, inside, monkeypatch):  # noqa: F811
    """A plain adapter, DoRA, embedding and head: their shapes are all that a check without proof compares with."""
    monkeypatch.setattr("loraplex.serving.offline_check.load_base", None)
    assert inside("check", ROOT / "adapters" / name, "--base", BASE).returncode == 0


def test_prove(inside):  # noqa: F811
    done = inside("check", ROOT / "adapters" / "pig", "--base", BASE, "--prove", "--json", "--dtype", "float32")
    found = json.loads(done.stdout)
    assert found["proof"]["passed"]
    assert found["proof"]["dtype"] == "float32"
    assert found["proof"]["largest_error"] < 1e-5
    assert found["report"]["base"]["fingerprint"] == found["proof"]["base_fingerprint"]
    shown = inside("check", ROOT / "adapters" / "pig", "--base", BASE, "--prove", "--dtype", "float32").stdout
    assert "fits, and is proven" in shown
    assert "linear + DoRA" in shown


def test_what_would_be_refused(inside, tmp_path: Path):  # noqa: F811
    folder = tmp_path / "spoilt"
    shutil.copytree(ROOT / "adapters" / "upper", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    assert_refused(inside("check", folder, "--base", BASE), "rank 5", "rank_pattern")
    upper = ROOT / "adapters" / "upper"
    assert_refused(inside("check", upper, "--base", BASE, "--max-lora-rank", 2), "limit is 2", "--max-lora-rank 4")
    assert_refused(inside("check", upper, "--base", tmp_path), "is not a model folder", code=2)
    assert_refused(inside("check", tmp_path, "--base", BASE), "not a PEFT adapter")
    assert inside("check", tmp_path / "nowhere", "--base", BASE).returncode == 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "serving_profile.json").write_text('{"temperature": "cold"}')
    assert_refused(inside("check", folder, "--base", BASE), "serving_profile.json")


def test_what_only_the_proof_finds(inside, tmp_path: Path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "faint"
    shutil.copytree(ROOT / "adapters" / "upper", folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: tensor * 1e-6 for key, tensor in load_file(weights).items()}, weights)
    flags = ("check", folder, "--base", BASE, "--dtype", "bfloat16")
    assert inside(*flags).returncode == 0
    assert_refused(inside(*flags, "--prove"), "without effect", "bfloat16")


def test_the_command_itself():
    done = run("check", ROOT / "adapters" / "upper", "--base", BASE)
    assert done.returncode == 0, done.stderr
    assert "upper fits" in done.stdout
