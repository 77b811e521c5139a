"""The endpoint against the bare engine: same weights, same regions, same number of clients, same run.

    python -m benchmarks.serve                                  # the small checkpoint on this processor
    python -m benchmarks.serve --engines torch,waiting,slow     # beside it engines that only wait, as a GPU's host does

Sides, which take turns: `batch` is the engine with all prepared regions at once; `engine` the same from as many threads
as there are clients, one region at a time; `engine + reading` also decodes the picture and cuts the region out, in
those threads; `endpoint` is HTTP through Ray Serve, from JSON to JSON. `first token` is of a streamed run of its own.

Clients are on the same machine and share its cores. They are a few lines over sockets, so that what is measured is the
server: OpenAI's client takes some two milliseconds of a processor a request, which is more than the whole way there
and back. The processor times are those of each process during the endpoint's runs, divided by its requests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage

from meddam_core.dam.config import read_config
from meddam_core.engines import make_engine
from meddam_core.engines.base import Request, Sampling
from meddam_core.engines.loop import EngineLoop
from ray_jobs.serve.config import Config
from ray_jobs.serve.job import end, set_environment, start
from ray_jobs.serve.replica import model_folder
from ray_jobs.serve.schema import ChatRequest
from ray_jobs.serve.service import Service
from ray_jobs.session import session

QUESTION = "Describe the masked region in detail."
ENGINES = {
    "waiting": "benchmarks.waiting_engine:WaitingEngine",
    "slow": "benchmarks.waiting_engine:SlowWaitingEngine",
}
ROLES = {
    "ServeReplica": "replica",
    "engines.apart": "its engine",
    "ProxyActor": "proxy",
    "ServeController": "controller",
    "raylet": "raylet",
    "gcs_server": "gcs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One side at one concurrency."""

    what: str
    clients: int
    wall_s: float
    times_s: list[float]
    first_s: list[float]

    @property
    def per_s(self) -> float:
        return len(self.times_s) / self.wall_s

    def joined(self, other: Run | None) -> Run:
        """Both rounds as one."""
        if other is None:
            return self
        return Run(
            what=self.what, clients=self.clients, wall_s=self.wall_s + other.wall_s,
            times_s=self.times_s + other.times_s, first_s=self.first_s + other.first_s,
        )  # fmt: skip

    def at(self, share: float) -> float:
        """Milliseconds within which this share of the requests was answered."""
        return 1000 * float(np.quantile(self.times_s, share))


def main() -> None:
    args = _arguments()
    set_environment()
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load "
          f"{os.getloadavg()[0]:.1f}, {args.threads} thread(s) of the engine, {args.new_tokens} new tokens, "
          f"pictures of {args.side} pixels")  # fmt: skip
    bodies = [_body(number, args) for number in range(args.requests)]
    with session(max(2, os.cpu_count() or 2)):
        for name in args.engines:
            cfg = Config(
                model=args.model, port=_free_port(), engine=ENGINES.get(name, name), num_threads=args.threads,
                device=args.device, max_ongoing=4 * max(args.concurrency), dtype=args.dtype, keep_pictures_mb=0,
            )  # fmt: skip
            sides = Sides(cfg, start(cfg), bodies, args)
            runs = sides.measure()
            end()
            sides.loop.close()
            report(name, runs, args.concurrency, sides.processor_ms)


class Sides:
    """The bare engine in this process, and the endpoint at `url`, over the same requests."""

    def __init__(self, cfg: Config, url: str, bodies: list[dict[str, Any]], args: argparse.Namespace) -> None:
        self._args = args
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._address = (host, int(port))
        self._bodies = bodies
        self.loop = _bare_engine(cfg)
        self._service = Service(cfg, self.loop, read_config(model_folder(cfg)).view.size, "bare")
        self._ready = [self._request(body) for body in bodies]
        self.processor_ms: dict[int, dict[str, float]] = {}

    def measure(self) -> list[Run]:
        """Every side at every concurrency. The sides take turns: a busy machine slows all of them."""
        self._described(0)
        asyncio.run(self._ask(4, min(32, len(self._bodies)), False))
        runs: dict[tuple[str, int], Run] = {}
        for clients in self._args.concurrency:
            for _ in range(self._args.rounds):
                for run in (
                    self._batch(clients),
                    self._in_threads("engine", self._described, clients),
                    self._endpoint(clients, False),
                    self._in_threads("engine + reading", self._read_and_described, clients),
                    self._endpoint(clients, True),
                ):
                    runs[run.what, clients] = run.joined(runs.get((run.what, clients)))
        return list(runs.values())

    def _count(self, clients: int) -> int:
        args = self._args
        return max(args.requests, 4 * clients) if clients > 1 else min(args.requests, args.alone)

    def _request(self, body: dict[str, Any]) -> Request:
        """What the endpoint makes of a body, by the same code."""
        asked = ChatRequest.model_validate(body)
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        data = base64.b64decode(url.partition(",")[2])
        describer = self._service.describer
        (prepared,) = describer.one_region(data, asked, asked).prepared
        assert prepared.views_N8SS is not None
        sampling = Sampling(max_new_tokens=self._args.new_tokens)
        return describer.request(prepared.views_N8SS, f"<image>\n{QUESTION}", sampling)

    def _fresh(self, number: int) -> Request:
        given = self._ready[number % len(self._ready)]
        return self._service.describer.request(given.views_N8SS, given.query, given.sampling)

    def _described(self, number: int) -> None:
        self.loop.generate([self._fresh(number)])

    def _read_and_described(self, number: int) -> None:
        self.loop.generate([self._request(self._bodies[number % len(self._bodies)])])

    def _batch(self, clients: int) -> Run:
        requests = [self._fresh(n) for n in range(self._count(clients))]
        started = time.perf_counter()
        self.loop.generate(requests)
        wall_s = time.perf_counter() - started
        return Run(what="batch", clients=clients, wall_s=wall_s, times_s=[wall_s] * len(requests), first_s=[])

    def _in_threads(self, what: str, work: Callable[[int], None], clients: int) -> Run:
        times: list[float] = []

        def one(number: int) -> None:
            started = time.perf_counter()
            work(number)
            times.append(time.perf_counter() - started)

        with ThreadPoolExecutor(clients) as pool:
            started = time.perf_counter()
            list(pool.map(one, range(self._count(clients))))
            return Run(what=what, clients=clients, wall_s=time.perf_counter() - started, times_s=times, first_s=[])

    def _endpoint(self, clients: int, stream: bool) -> Run:
        before = _processor_s()
        run = asyncio.run(self._ask(clients, self._count(clients), stream))
        if not stream:
            after = _processor_s()
            used = {role: 1000 * (after[role] - before.get(role, 0)) / len(run.times_s) for role in after}
            self.processor_ms[clients] = used
        return run

    async def _ask(self, clients: int, count: int, stream: bool) -> Run:
        messages = [_http({**body, "stream": stream}) for body in self._bodies]
        times: list[float] = []
        firsts: list[float] = []
        numbers = iter(range(count))

        async def client() -> None:
            reader, writer = await asyncio.open_connection(*self._address)
            for number in numbers:
                started = time.perf_counter()
                writer.write(messages[number % len(messages)])
                first_s = await _answer(reader, stream)
                times.append(time.perf_counter() - started)
                if first_s is not None:
                    firsts.append(first_s - started)
            writer.close()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        what = "endpoint, stream" if stream else "endpoint"
        return Run(
            what=what, clients=clients, wall_s=time.perf_counter() - started, times_s=times, first_s=firsts
        )  # fmt: skip


def _bare_engine(cfg: Config) -> EngineLoop:
    import torch

    torch.set_num_threads(cfg.num_threads or 1)
    device = "cuda" if cfg.device == "cuda" else "cpu"
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return EngineLoop(make_engine(cfg.engine, model_folder(cfg), device=device, dtype=dtype)[0])


def _http(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: bench", "Content-Type: application/json"]
    return "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content


async def _answer(reader: asyncio.StreamReader, stream: bool) -> float | None:
    """Reads one answer to its end; the time of its first text, of a stream. Raises RuntimeError unless it is 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.decode("latin-1"))
    if b"content-length: " in head:
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        return None
    first_s: float | None = None
    while size := int(await reader.readline(), 16):
        part = await reader.readexactly(size + 2)
        if stream and first_s is None and b'"content":"' in part and b'"content":""' not in part:
            first_s = time.perf_counter()
    await reader.readexactly(2)
    return first_s


def _processor_s() -> dict[str, float]:
    """Seconds of the processors used so far, by what a process is for."""
    used: dict[str, float] = defaultdict(float)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line, stat = (entry / "cmdline").read_text(), (entry / "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        role = "clients" if int(entry.name) == os.getpid() else next((r for k, r in ROLES.items() if k in line), None)
        if role is not None:
            fields = stat.rpartition(")")[2].split()
            used[role] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def report(engine: str, runs: list[Run], concurrency: list[int], processor_ms: dict[int, dict[str, float]]) -> None:
    """Prints the table and the ratios that matter."""
    print(f"\n{engine}\n\n| what | clients | regions/s | p50 ms | p95 ms | p99 ms | first token p50 ms |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        first = f"{1000 * statistics.median(run.first_s):.1f}" if run.first_s else ""
        print(f"| {run.what} | {run.clients} | {run.per_s:.1f} | {run.at(0.5):.1f} | {run.at(0.95):.1f} | "
              f"{run.at(0.99):.1f} | {first} |")  # fmt: skip
    by = {(run.what, run.clients): run for run in runs}
    print()
    for clients in concurrency:
        endpoint = by["endpoint", clients]
        for side in ("engine", "engine + reading"):
            other = by[side, clients]
            print(f"{engine}, {clients} clients, against {side}: {endpoint.at(0.5) - other.at(0.5):+.1f} ms p50, "
                  f"throughput ratio {endpoint.per_s / other.per_s:.3f}")  # fmt: skip
        print(f"{engine}, {clients} clients, against batch: throughput ratio "
              f"{endpoint.per_s / by['batch', clients].per_s:.3f}")  # fmt: skip
        spent = ", ".join(f"{role} {ms:.1f}" for role, ms in processor_ms[clients].items() if ms >= 0.05)
        print(f"{engine}, {clients} clients, ms of a processor a request: {spent}")


def _body(number: int, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    tiles = rng.integers(0, 255, (args.side // 16, args.side // 16, 3), np.uint8)
    picture = PilImage.fromarray(np.kron(tiles, np.ones((16, 16, 1), np.uint8)))
    alpha = PilImage.new("L", picture.size, 0)
    x, y = (int(v) for v in rng.integers(0, args.side // 2, 2))
    alpha.paste(255, (x, y, x + args.side // 4, y + args.side // 3))
    sink = io.BytesIO()
    PilImage.merge("RGBA", (*picture.split(), alpha)).save(sink, "PNG")
    url = "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"model": "meddam", "messages": [{"role": "user", "content": content}], "max_tokens": args.new_tokens}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tests/data/oracle/dam_tiny/checkpoint")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["torch"],
                        help="torch, mii, waiting (8 regions in 40 ms), slow (in 400 ms), module:Class")  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--side", type=int, default=512, help="side of the pictures, pixels")
    parser.add_argument("--requests", type=int, default=128, help="different requests")
    parser.add_argument("--alone", type=int, default=60, help="requests of a single client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=lambda text: [int(v) for v in text.split(",")], default=[1, 8, 64])
    return parser.parse_args()


if __name__ == "__main__":
    main()
