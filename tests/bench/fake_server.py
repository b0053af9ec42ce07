"""A small OpenAI server with fixed delays, in a thread of its own; the model's name says how it behaves."""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field

FIRST, GAP = 0.08, 0.02  # seconds to the first token, and between tokens
PIECE = "tok "


@dataclass
class Seen:
    """One request for tokens as it arrived."""

    body: dict
    at: float


@dataclass
class FakeServer:
    """`models` are served. good, other: as asked; "slow": three times the delays; "refused": 429; "failing": an error
    event after one token; "broken": the connection ends after one token; "renamed": answers under another name;
    "silent": no usage; "whole": JSON instead of a stream; "aborted": finish reason abort; "garbage": no JSON.

    `refuses`: fields of a request that are answered with 400. `has_tokenize`: /tokenize answers (a token a word).
    """

    models: tuple[str, ...] = ("good",)
    refuses: tuple[str, ...] = ()
    has_tokenize: bool = False
    seen: list[Seen] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0

    def __enter__(self) -> "FakeServer":
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def forget(self) -> None:
        self.seen.clear()
        self.most_open = 0

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        tasks: set[asyncio.Task] = set()

        async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                while await self._answer(reader, writer):
                    pass
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False: the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        length = next((int(line.split(":")[1]) for line in head.lower().splitlines() if "content-length" in line), 0)
        raw = await reader.readexactly(length)
        if path == "/v1/models":
            return self._json(writer, 200, {"data": [{"id": name} for name in self.models]})
        if path == "/tokenize" and self.has_tokenize:
            words = json.loads(raw)["prompt"].split()
            return self._json(writer, 200, {"tokens": list(range(10, 10 + len(words)))})
        if path in ("/v1/completions", "/v1/chat/completions"):
            body = json.loads(raw)
            self.seen.append(Seen(body, time.perf_counter()))
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
            try:
                return await self._generate(writer, body, is_chat="chat" in path)
            finally:
                self.num_open -= 1
        return self._json(writer, 404, {"error": {"code": "not_found", "message": path}})

    def _json(self, writer: asyncio.StreamWriter, status: int, body: dict) -> bool:
        data = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n" % status)
        writer.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        return True

    async def _generate(self, writer: asyncio.StreamWriter, body: dict, *, is_chat: bool) -> bool:
        model = body["model"]
        for name in self.refuses:
            if name in body:
                return self._json(writer, 400, {"error": {"code": "bad", "message": f"unknown field {name}"}})
        if model == "refused":
            return self._json(writer, 429, {"error": {"code": "overloaded", "message": "try again"}})
        if model == "whole":
            return self._json(writer, 200, {"choices": [{"text": PIECE}]})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        factor = 3 if model == "slow" else 1
        answered = "another" if model == "renamed" else model
        if is_chat:
            self._event(writer, {"model": answered, "choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for index in range(body["max_tokens"]):
            await asyncio.sleep(factor * (GAP if index else FIRST))
            if model in ("failing", "broken", "garbage") and index == 1:
                break
            choice: dict = {"delta": {"content": PIECE}} if is_chat else {"text": PIECE}
            self._event(writer, {"model": answered, "choices": [{**choice, "finish_reason": None}]})
        if model == "broken":
            return False
        if model == "failing":
            self._event(writer, {"error": {"code": "step_failed", "message": "oh"}})
        elif model == "garbage":
            self._chunk(writer, b"data: {nonsense\n\n")
        else:
            end: dict = {"delta": {}} if is_chat else {"text": ""}
            reason = "abort" if model == "aborted" else "length"
            self._event(writer, {"model": answered, "choices": [{**end, "finish_reason": reason}]})
        if model != "silent" and (body.get("stream_options") or {}).get("include_usage"):
            prompt = body.get("prompt", "")
            count = len(prompt) if isinstance(prompt, list) else 2 * len(str(prompt).split()) + 1
            usage = {"prompt_tokens": count, "completion_tokens": body["max_tokens"]}
            self._event(writer, {"model": answered, "choices": [], "usage": usage})
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True

    def _event(self, writer: asyncio.StreamWriter, event: dict) -> None:
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
