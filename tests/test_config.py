"""Settings: precedence, what is refused, and by which name."""

from pathlib import Path

import pytest

from loraplex.config import ClientSettings, Settings, prepare_process
from loraplex.errors import StartupError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    import os

    for name in list(os.environ):
        if name.startswith("LORAPLEX_"):
            monkeypatch.delenv(name)


def load(config_file: Path | None = None, **flags) -> Settings:
    return Settings.load({"model": Path(__file__).parent, **flags}, config_file)


def test_flags_beat_the_environment_which_beats_the_file(tmp_path, monkeypatch):
    file = tmp_path / "loraplex.toml"
    file.write_text('port = 1\nmax_loras = 1\nmax_lora_rank = 1\nadapter_cache_bytes = "1GiB"\n')
    monkeypatch.setenv("LORAPLEX_PORT", "2")
    monkeypatch.setenv("LORAPLEX_MAX_LORAS", "2")
    settings = load(file, port=3)
    assert (settings.port, settings.max_loras, settings.max_lora_rank) == (3, 2, 1)
    assert settings.adapter_cache_bytes == 1 << 30
    assert load(max_num_seqs=None).max_num_seqs == 32  # None: not given


def test_modules_and_names(tmp_path):
    folder = tmp_path / "My Model+1"
    folder.mkdir()
    assert load(model=folder).base_name == "My-Model-1"
    settings = load(lora_modules=["a=/x", "b=/y=z"])
    assert settings.lora_modules == {"a": Path("/x"), "b": Path("/y=z")}
    assert load(lora_modules="a=/x,b=/y").lora_modules.keys() == {"a", "b"}
    assert load(lora_modules={"a": Path("/x")}).lora_modules == {"a": Path("/x")}
    assert load(served_model_name="shown").base_name == "shown"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"port": 70000}, "--port"),
        ({"port": "many"}, "--port"),
        ({"device": "tpu"}, "--device"),
        ({"dtype": "int4"}, "--dtype"),
        ({"max_loras": 0}, "--max-loras"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization"),
        ({"adapter_cache_bytes": "lots"}, "--adapter-cache-bytes"),
        ({"lora_modules": ["nopath"]}, "--lora-modules"),
        ({"lora_modules": ["a b=/x"]}, "--lora-modules"),
        ({"served_model_name": "a@b"}, "--served-model-name"),
        ({"generation_config": "vllm"}, "--generation-config"),
        ({"api_key": "short"}, "--api-key"),
        ({"surprise": 1}, "--surprise"),
        ({"model": None}, "--model"),
        ({"model": Path("/nowhere")}, "/nowhere is not a folder"),
        ({"adapters": Path("/nowhere")}, "--adapters /nowhere is not a folder"),
        ({"host": "0.0.0.0"}, "--api-key"),
        ({"host": "::"}, "--insecure"),
        ({"host": "192.168.0.7"}, "--host"),
    ],
)
def test_what_is_refused_is_named(flags, text):
    with pytest.raises(StartupError, match=text):
        load(**flags)


def test_a_key_is_never_in_a_message():
    with pytest.raises(StartupError) as error:
        load(api_key="secret")
    assert "secret" not in error.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert load(host=host).api_key is None


def test_off_loopback_with_a_key_or_at_ones_own_risk():
    assert load(host="0.0.0.0", api_key="sesame-open").host == "0.0.0.0"
    assert load(host="0.0.0.0", insecure=True).insecure


def test_files_that_are_none(tmp_path):
    with pytest.raises(StartupError, match=r"absent\.toml does not exist"):
        load(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("port = = 1")
    with pytest.raises(StartupError, match="not valid TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "unknown.toml").write_text("colour = 1")
    with pytest.raises(StartupError, match="--colour"):
        load(tmp_path / "unknown.toml")


def test_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load().resolved_data_dir == tmp_path / "loraplex"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load().resolved_data_dir == tmp_path / ".local/share/loraplex"
    assert load(data_dir=tmp_path / "d").resolved_data_dir == tmp_path / "d"


def test_where_the_client_looks(monkeypatch):
    assert ClientSettings().url == "http://127.0.0.1:8000"
    monkeypatch.setenv("LORAPLEX_URL", "http://other:1")
    monkeypatch.setenv("LORAPLEX_API_KEY", "sesame-open")
    assert (ClientSettings().url, ClientSettings().api_key) == ("http://other:1", "sesame-open")


def test_the_operator_has_the_last_word_on_the_process(monkeypatch, tmp_path):
    import os

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    prepare_process(tmp_path)
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["HF_HUB_OFFLINE"]) == ("ACTIVE", "1")


def test_what_is_served_without_a_model_yields_to_the_environment(tmp_path, monkeypatch):
    """The demo is the choice only where nobody chose, setting by setting."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "mine").mkdir()

    def demo() -> dict:
        return {"model": tmp_path / "demo", "served_model_name": "demo-base"}

    assert Settings.load({}, without_model=demo).model == tmp_path / "demo"
    monkeypatch.setenv("LORAPLEX_SERVED_MODEL_NAME", "other")
    assert Settings.load({}, without_model=demo).base_name == "other"
    monkeypatch.delenv("LORAPLEX_SERVED_MODEL_NAME")
    monkeypatch.setenv("LORAPLEX_MODEL", str(tmp_path / "mine"))
    settings = Settings.load({}, without_model=demo)
    assert (settings.model, settings.base_name) == (tmp_path / "mine", "mine")
