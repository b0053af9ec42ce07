"""merge, resize, bake and extract as a person or a script calls them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from loraplex.cli import main

LORAPLEX = str(Path(sys.executable).parent / "loraplex")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def run_inside(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loraplex", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        out = capsys.readouterr()
        return int(exit.value.code or 0), out.out, out.err

    return run_inside


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters on it. Shared: do not change it."""
    root = tmp_path_factory.mktemp("shelf")
    tiny.make_model("llama").save_pretrained(root / "base")
    for seed, (name, fields) in enumerate({"a": {"r": 8}, "b": {"r": 4, "use_rslora": True}}.items()):
        model = tiny.make_model("llama")
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"], **fields)
        peft.get_peft_model(model, config).save_pretrained(root / name)  # type: ignore[arg-type]
    return root


def test_merge_and_resize(run: Callable, shelf: Path, tmp_path: Path):
    code, out, _ = run("merge", shelf / "a", shelf / "b", "--weights", "0.5,2", "--out", tmp_path / "sum")
    assert code == 0
    assert "model.layers.{0-1}.self_attn.q_proj" in out
    assert "100.00%" in out
    code, out, _ = run("resize", tmp_path / "sum", "--energy", "0.9", "--out", tmp_path / "small", "--json")
    assert code == 0
    reply = json.loads(out)
    assert all(0.9 <= module["energy"] <= 1 and module["rank"] < module["before"] == 12 for module in reply["modules"])
    assert reply["bytes"] == (tmp_path / "small" / "adapter_model.safetensors").stat().st_size
    peft.PeftModel.from_pretrained(tiny.make_model("llama"), str(tmp_path / "small"))


def test_merge_by_another_method_and_type(run: Callable, shelf: Path, tmp_path: Path):
    options = ["--method", "dare", "--density", "0.5", "--seed", "3", "--dtype", "bfloat16"]
    code, _, _ = run("merge", shelf / "a", shelf / "a", *options, "--out", tmp_path / "out")
    assert code == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_bake_and_extract_are_inverse(run: Callable, shelf: Path, tmp_path: Path):
    code, out, _ = run("bake", shelf / "a", "--base", shelf / "base", "--out", tmp_path / "baked")
    assert code == 0
    assert "model.layers.{0-1}.self_attn.q_proj.weight" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    code, out, _ = run(
        "extract", tmp_path / "baked", "--base", shelf / "base", "--rank", 8, "--out", tmp_path / "back", "--json"
    )
    assert code == 0
    reply = json.loads(out)
    assert reply["left"] == reply["saved"] == []
    assert reply["energy"] > 1 - 1e-6
    assert len(reply["modules"]) == 2


def test_extract_names_what_it_leaves(run: Callable, shelf: Path, tmp_path: Path):
    model = tiny.make_model("llama")
    model.model.norm.weight.mul_(2)
    model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "tuned")
    arguments = ["extract", tmp_path / "tuned", "--base", shelf / "base", "--rank", "64"]
    _, out, _ = run(*arguments, "--out", tmp_path / "plain")
    assert "NOT in the adapter: model.norm.weight, changed by 1.00e+00" in out
    _, out, _ = run(*arguments, "--out", tmp_path / "saved", "--save-modules")
    assert "saved whole: model.norm.weight" in out


def test_what_is_there_is_kept(run: Callable, shelf: Path, tmp_path: Path):
    arguments = ["resize", shelf / "a", "--rank", "2", "--out", tmp_path / "out"]
    assert run(*arguments)[0] == 0
    code, _, error = run(*arguments)
    assert code == 2
    assert "--force" in error
    assert run(*arguments, "--force")[0] == 0
    assert run("resize", shelf / "a", "--rank", "2", "--out", shelf / "a", "--force")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["merge", "a", "b", "--weights", "1"], "2 adapters and 1 weights"),
        (["merge", "a", "b", "--weights", "much,little"], "numbers with commas"),
        (["merge", "a", "b", "--method", "ties"], "density"),
        (["merge", "a", "nowhere"], "does not exist"),
        (["resize", "a"], "by rank, or by energy"),
        (["bake", "a", "--base", "a"], "no config.json"),
        (["bake", "base", "--base", "base"], "does not exist"),
        (["extract", "base", "--base", "base"], "nothing to extract"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(
    run: Callable, shelf: Path, tmp_path: Path, arguments: list[str], why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(shelf)
    code, out, error = run(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert why in error
    assert not out
    assert not list(tmp_path.iterdir())


def test_as_a_process_of_its_own(shelf: Path, tmp_path: Path):
    """Nothing on stdout but the reply; a file that links stand for is read, as in a download's cache."""
    (tmp_path / "linked").mkdir()
    for file in (shelf / "a").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    command = [LORAPLEX, "merge", str(tmp_path / "linked"), "--rank", "3", "--out", str(tmp_path / "out"), "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    done = subprocess.run([*command, "--base", str(shelf / "base")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert {module["rank"] for module in json.loads(done.stdout)["modules"]} == {3}
