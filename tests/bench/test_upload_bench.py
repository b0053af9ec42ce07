"""`bench upload` against a real server of a tiny random base."""

import json

import pytest
from test_tiers_bench import TINY

from loraplex.bench.preparation import BaseShape
from loraplex.bench.random_model import save_random_adapter, save_random_base
from loraplex.bench.tables import upload_table
from loraplex.bench.upload import PHASES, UploadBench, UploadBody, UploadSettings


@pytest.fixture
def folder(tmp_path):
    shape = BaseShape.read(save_random_base(tmp_path / "base", **TINY))
    return save_random_adapter(shape.targets.values(), 2, 0, shape.dtype, tmp_path / "adapter")


def test_every_body_is_another_adapter(folder):
    body = UploadBody(folder)
    one, other = (b"".join(body.make(number)) for number in (1, 2))
    assert body.num_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert len(one) == len(other)
    assert one.split(b"\r\n\r\n")[3] != other.split(b"\r\n\r\n")[3]
    assert one.count(b"--bench") == 4
    assert one.endswith(b"--bench--\r\n")


@pytest.mark.slow  # a server, and streams for seconds
def test_upload(limits):
    settings = UploadSettings(megabytes=0.2, streams=2, idle=2, rounds=1, seconds=1.0, shape=TINY)
    shown: list[str] = []
    result = UploadBench(settings, shown.append, limits).run()
    assert shown[-2:] == ["streams beside uploads, 1 of 1", "streams beside writes, 1 of 1"]
    assert abs(result["bytes"] - 200_000) < 40_000
    assert result["idle"]["uploads"] == 2
    assert result["beside"]["uploads"] >= 1
    for part in (result["idle"], result["beside"]):
        assert set(part["phase_seconds"]) == set(PHASES)
        assert 0 < sum(part["phase_seconds"].values()) <= 2 * part["seconds"] * part["uploads"]
        assert 0 < part["sent_seconds"] <= part["seconds"]
    assert all(speed > 0 for speed in result["disk_mb_s"].values())
    assert set(result["gaps_ms"]) == {"alone", "beside", "writes"}
    assert all(gaps["p50"] <= gaps["p99"] <= gaps["max"] for gaps in result["gaps_ms"].values())
    assert json.loads(json.dumps(result)) == result
    assert upload_table(result).row_count > len(PHASES)
