"""Uploads that were spoilt at random, over a real socket: each is accepted or refused, and the server goes on.

`make fuzz` sends 20,000 of them; the ordinary tests send a few hundred.
"""

import json
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from folders import parts_of
from live import LiveServer
from test_api_completions import text_of

MANY = 20_000
FEW = 300
KEEP = 16  # versions of accepted ones that lie about before they are deleted

WORDS = [
    "",
    "../..",
    "\x00",
    "q_proj",
    "a" * 300,
    "<b>",
    "$(id)",
    "é😀",
    "lora_A",
    "-1",
    "null",
    "%2e%2e/",
    "\\",
    "NaN",
]
NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, True, False]
MARK = b"fuzz7MA4YWxkTrZu0gW"


def anything(rng: random.Random) -> object:
    """A JSON value of some kind."""
    match rng.randrange(6):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(WORDS)
        case 2:
            return [anything(rng) for _ in range(rng.randrange(3))]
        case 3:
            return {rng.choice(WORDS): anything(rng) for _ in range(rng.randrange(3))}
        case 4:
            return None
        case _:
            return rng.choice([r"(a+)+$", "all-linear", [["q_proj"]], {"default": 4}, "bfloat16", "LORA", 1.0])


class Spoiler:
    """Makes bodies out of good adapters."""

    def __init__(self, goods: list[Path]):
        self._goods = [{part: data for part, (_, data) in parts_of(folder).items()} for folder in goods]

    def body(self, rng: random.Random) -> bytes:
        good = rng.choice(self._goods)
        config, weights = good["config"], good["weights"]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            match rng.randrange(4):
                case 0:
                    config = self._config(config, rng)
                case 1:
                    weights = self._header(weights, rng)
                case 2:
                    weights = self._bytes(weights, rng)
                case 3:
                    config = self._bytes(config, rng) if rng.random() < 0.3 else self._config(config, rng)
        parts = [("name", b"fuzz"), ("config", config), ("weights", weights)]
        return self._multipart(parts, rng)

    def _config(self, config: bytes, rng: random.Random) -> bytes:
        """A field changed, dropped, added or exchanged with another."""
        try:
            fields = json.loads(config)
        except ValueError:
            return config
        if not isinstance(fields, dict) or not fields:
            return config
        one, other = rng.choice(list(fields)), rng.choice(list(fields))
        match rng.randrange(4):
            case 0:
                fields[one] = anything(rng)
            case 1:
                del fields[one]
            case 2:
                fields[rng.choice([*WORDS, "use_dora", "modules_to_save", "rank_pattern", "bias"])] = anything(rng)
            case 3:
                fields[one], fields[other] = fields[other], fields[one]
        return json.dumps(fields).encode()

    def _header(self, weights: bytes, rng: random.Random) -> bytes:
        """The safetensors header taken apart, changed, and put together again."""
        length = int.from_bytes(weights[:8], "little")
        try:
            header = json.loads(weights[8 : 8 + length])
            names = [name for name in header if name != "__metadata__"]
            name = rng.choice(names)
        except (ValueError, IndexError, TypeError):
            return weights
        entry = dict(header[name]) if isinstance(header[name], dict) else {}
        match rng.randrange(7):
            case 0:
                entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "", 7])
            case 1:
                shape = list(entry.get("shape", []))
                rng.shuffle(shape)
                entry["shape"] = rng.choice([shape, [*shape, 1], shape[:-1], [rng.choice(NUMBERS)], "4"])
            case 2:
                start, end = entry.get("data_offsets", [0, 0])
                shift = rng.choice([-4, 4, 1, 2**40])
                entry["data_offsets"] = rng.choice(
                    [[start + shift, end + shift], [end, start], [start], [start, end, 0]]
                )
            case 3:
                other = rng.choice(names)
                entry, header[other] = header[other], entry
            case 4:
                header[rng.choice([*WORDS, name.replace("layers.0", "layers.9"), name + ".default"])] = entry
            case 5:
                del header[name]
            case 6:
                header["__metadata__"] = anything(rng)
        if name in header:
            header[name] = entry
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + weights[8 + length :]

    def _bytes(self, data: bytes, rng: random.Random) -> bytes:
        """Bytes flipped, cut, added, or a length that lies."""
        changed = bytearray(data)
        match rng.randrange(5):
            case 0:
                for _ in range(rng.choice([1, 2, 16])):
                    if changed:
                        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 1:
                del changed[rng.randrange(len(changed) + 1) :]
            case 2:
                changed += rng.randbytes(rng.choice([1, 4, 100]))
            case 3:
                changed[:8] = struct.pack("<Q", rng.choice([0, 1, 7, len(data), 2**60, 2**64 - 1, rng.randrange(4096)]))
            case 4:
                start = rng.randrange(len(changed) + 1)
                changed[start : start + 64] = rng.randbytes(64)
        return bytes(changed)

    def _multipart(self, parts: list[tuple[str, bytes]], rng: random.Random) -> bytes:
        """The parts as a body; in one of twenty something is wrong with it."""
        spoil = rng.randrange(100)
        if spoil == 0:
            parts = parts[1:]
        elif spoil == 1:
            parts = [*parts, rng.choice(parts)]
        elif spoil == 2:
            parts = [("name", rng.choice(WORDS).encode()), *parts[1:]]
        rng.shuffle(parts)
        body = b"".join(
            b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            % (MARK, name.encode(), b"" if name == "name" else b'; filename="f"', data)
            for name, data in parts
        )
        body += b"--%s--\r\n" % MARK
        if spoil == 3:
            return body[: rng.randrange(len(body))]
        if spoil == 4:
            return self._bytes(body, rng)
        return body


def resident() -> int:
    """MiB of this process's memory, the server's and the test's."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20


def send(server: LiveServer, goods: list[Path], count: int, look: Callable[[int], None] = lambda sent: None) -> Counter:
    """`count` uploads, one after the other; how many got which status."""
    spoiler, rng, statuses = Spoiler(goods), random.Random(0), Counter[int]()
    headers = {"content-type": f"multipart/form-data; boundary={MARK.decode()}"}
    before = text_of(server.client, model="red", max_tokens=6)
    for number in range(1, count + 1):
        reply: httpx2.Response = server.client.post("/v1/adapters", content=spoiler.body(rng), headers=headers)
        assert reply.status_code in (200, 201) or 400 <= reply.status_code < 500, (
            number,
            reply.status_code,
            reply.text,
        )
        statuses[reply.status_code] += 1
        if statuses[201] % KEEP == 0 and reply.status_code == 201:
            assert server.client.delete("/v1/adapters/fuzz").status_code == 200
        if number % 500 == 0 or number == count:
            assert server.client.get("/health").json() == {"status": "ok"}
            assert not server.staging
            assert text_of(server.client, model="red", max_tokens=6) == before
            look(number)
    server.client.delete("/v1/adapters/fuzz")
    server.check_at_rest()
    return statuses


@pytest.fixture
def goods(adapter_folders: dict[str, Path]) -> list[Path]:
    return [adapter_folders["green"], adapter_folders["blue"]]


@pytest.fixture
def fuzzed(make_settings, tmp_path: Path):
    with LiveServer(make_settings(tmp_path / "data")) as server:
        yield server


def test_a_few_hundred(fuzzed: LiveServer, goods: list[Path]):
    statuses = send(fuzzed, goods, FEW)
    assert statuses[201] > 0
    assert statuses[422] > FEW / 3


@pytest.mark.fuzz
def test_twenty_thousand(fuzzed: LiveServer, goods: list[Path]):
    """Memory is flat: after the first tenth it grows by no more than a twentieth."""
    memory: dict[int, int] = {}

    def look(sent: int) -> None:
        memory[sent] = resident()
        sys.stdout.write(f"{sent} sent, {memory[sent]} MiB\n")

    statuses = send(fuzzed, goods, MANY, look)
    sys.stdout.write(f"{dict(statuses)}\n")
    assert statuses[201] > 100
    assert memory[MANY] <= memory[MANY // 10] * 1.05
