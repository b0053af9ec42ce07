"""Settings: flags, LORAPLEX_* variables and a configuration file, in that order of precedence.

The only reader of argv and environment. Imports no torch, so that what must be set before torch is imported can be.
"""

import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from loraplex.errors import InvalidName, StartupError
from loraplex.routing.names import validate_name

DEFAULT_PORT = 8000
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


def _check_name(name: str | None) -> str | None:
    try:
        return name if name is None else validate_name(name)
    except InvalidName as error:
        raise ValueError(error.message) from None


class Settings(BaseSettings):
    """What `loraplex serve` takes. Names follow vLLM where the meaning is the same. Sizes accept 2GiB, 512MB, bytes."""

    model_config = SettingsConfigDict(
        env_prefix="LORAPLEX_", extra="forbid", toml_file=None, hide_input_in_errors=True, populate_by_name=True
    )

    model: Path
    adapters: Path | None = None
    lora_modules: Annotated[dict[str, Path], NoDecode] = Field(default_factory=dict)
    watch: bool = False
    watch_interval: float = Field(2.0, gt=0)
    allow_adapter_root: Annotated[tuple[Path, ...], NoDecode] = ()
    allow_bucket: Annotated[tuple[str, ...], NoDecode] = ()
    allow_hub: Annotated[tuple[str, ...], NoDecode] = ()
    hub_endpoint: str = "https://huggingface.co"
    hub_token: SecretStr | None = None
    fetch_timeout: float = Field(600.0, gt=0)
    data_dir: Path | None = None
    registry_url: SecretStr | None = None
    host: str = "127.0.0.1"
    port: int = Field(DEFAULT_PORT, ge=0, le=65535)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_loras: int | None = Field(None, ge=1, le=1024)
    max_lora_rank: int = Field(64, ge=1, le=4096)
    max_adapter_depth: int = Field(4, ge=1, le=64)
    adapter_cache_bytes: ByteSize = ByteSize(2 << 30)
    eviction: Literal["lru", "lrfu"] = "lrfu"
    adapter_ttl: float | None = Field(None, gt=0)
    kv_cache_bytes: ByteSize | None = None
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    max_num_seqs: int = Field(32, ge=1, le=4096)
    max_num_batched_tokens: int = Field(512, ge=1, le=1 << 20)
    max_model_len: int | None = Field(None, ge=64)
    max_waiting: int = Field(1024, ge=1)
    threads: int | None = Field(None, ge=1, le=1024)
    served_model_name: Annotated[str | None, AfterValidator(_check_name)] = None
    chat_template: Path | None = None
    generation_config: Literal["auto", "none"] = "auto"
    api_key: str | None = Field(None, min_length=8)
    insecure: bool = False
    quantization: Literal["int8", "int4", "nf4"] | None = None
    merge: Literal["off", "manual", "auto"] = "off"
    proof: Literal["on", "off"] = "on"
    proof_timeout: float = Field(30.0, gt=0, le=3600)
    max_upload_bytes: ByteSize = ByteSize(4 << 30)
    shutdown_timeout: float = Field(30.0, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _split_modules(cls, value: Any) -> Any:
        """name=path pairs: a list of them, or one text with commas."""
        if isinstance(value, dict):
            return value
        pairs = value.split(",") if isinstance(value, str) else list(value)
        modules = {}
        for pair in pairs:
            name, sign, path = str(pair).partition("=")
            if not sign or not path:
                raise ValueError(f"{pair!r} is not name=path")
            modules[_check_name(name)] = path
        return modules

    @field_validator("allow_adapter_root", "allow_bucket", "allow_hub", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        """A list, or one text with commas."""
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(
        cls,
        flags: dict[str, Any],
        config_file: Path | None = None,
        without_model: Callable[[], dict[str, Any]] = dict,
    ) -> "Settings":
        """Settings from the flags that were given (None: not given). Raises StartupError naming the setting.

        `without_model`: what is served when neither flags nor environment nor file name a model; each of these may
        still be set by the environment.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        if "model" not in given and config_file is None and _variable("model") not in os.environ:
            chosen_for = {n: v for n, v in without_model().items() if _variable(n) not in os.environ}
            given = {**chosen_for, **given}
        if config_file is not None and not config_file.is_file():
            raise StartupError(f"The configuration file {config_file} does not exist.")
        chosen = _with_file(cls, config_file)
        try:
            settings = chosen(**given)
        except tomllib.TOMLDecodeError as error:
            raise StartupError(f"The configuration file {config_file} is not valid TOML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            name = "--" + str(first["loc"][0] if first["loc"] else "model").replace("_", "-")
            where = f" (in {config_file}, a flag or the environment)" if config_file is not None else ""
            raise StartupError(f"{name}: {first['msg']}{where}") from error
        settings._check()
        return settings

    def _check(self) -> None:
        for flag, folder in (("model", self.model), ("--adapters", self.adapters)):
            if folder is not None and not folder.is_dir():
                raise StartupError(f"{flag} {folder} is not a folder. Name one on this machine; nothing is downloaded.")
        if self.watch and self.adapters is None:
            raise StartupError("--watch looks at the folder of --adapters, and there is none. Give --adapters DIR.")
        for root in self.allow_adapter_root:
            if not root.is_dir():
                raise StartupError(f"--allow-adapter-root {root} is not a folder. Name one on this machine.")
        if self.host not in LOOPBACK_HOSTS and self.api_key is None and not self.insecure:
            raise StartupError(
                f"--host {self.host} can be reached from other machines, and there is no --api-key: anyone could use "
                "this server and upload adapters. Set --api-key (or LORAPLEX_API_KEY), or say --insecure if a proxy "
                "in front checks who comes."
            )

    @property
    def base_name(self) -> str:
        """The name that requests use for the base model."""
        if self.served_model_name is not None:
            return self.served_model_name
        name = self.model.resolve().name
        return validate_name("".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)[:64])

    @property
    def resolved_data_dir(self) -> Path:
        """Where uploads and the registry live: --data-dir, else the user's data folder."""
        if self.data_dir is not None:
            return self.data_dir
        root = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
        return Path(root) / "loraplex"


def _variable(name: str) -> str:
    return f"LORAPLEX_{name.upper()}"


def _with_file(settings: type[Settings], config_file: Path | None) -> type[Settings]:
    if config_file is None:
        return settings

    class FileSettings(settings):
        model_config = SettingsConfigDict(toml_file=config_file)

    return FileSettings


class ClientSettings(BaseSettings):
    """Where the client commands find a server."""

    model_config = SettingsConfigDict(env_prefix="LORAPLEX_")

    url: str = f"http://127.0.0.1:{DEFAULT_PORT}"
    api_key: str | None = None


SWITCH_SECONDS = 0.0005
"""A step of the engine asks for Python some hundred times. At Python's own 5 ms a check of an upload held up a step for
35 ms, and 32 clients got 2 % fewer tokens; at 0.1 ms switching itself costs more than it brings."""


def prepare_process(cache_dir: Path | None = None) -> None:
    """Set what torch and numba read when they are imported, and how Python shares itself; call before either is.

    OpenMP's threads sleep between parallel regions instead of spinning: on a busy machine a spinning pool made a
    region of 1.5 ms take 16 ms. torch asks for huge pages: one core then reads weights a quarter faster. numba's
    compiled kernels are kept where they can be written. A thread that wants to run Python waits at most SWITCH_SECONDS
    for another one.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers obeys it too, when it loads weights
    if cache_dir is not None and not os.access(Path(__file__).parent, os.W_OK):
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir / "numba"))


def child_environment() -> dict[str, str]:
    """The environment of a confined child process: the time zone, and nothing that could be a secret."""
    given = {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**given, "TZ": os.environ["TZ"]} if "TZ" in os.environ else given
