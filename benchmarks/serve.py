"""The endpoint against the bare engine: same weights, same regions, same number of clients, same run.

    python -m benchmarks.serve --model tests/data/oracle/dam_tiny/checkpoint --threads 1
    python -m benchmarks.serve --engine benchmarks.waiting_engine:WaitingEngine --concurrency 1,64

`engine` is the engine's loop fed with prepared regions by as many threads as there are clients; `engine + reading` also
decodes the picture and cuts the region out, in those threads; `endpoint` is HTTP through Ray Serve, from JSON to JSON.
`first token` comes from a streamed run of its own. The clients run on the same machine and share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
from PIL import Image as PilImage

from meddam_core.engines.base import Sampling
from ray_jobs.serve.config import Config
from ray_jobs.serve.job import PROXY_CALLBACK, end, start
from ray_jobs.serve.replica import make_service
from ray_jobs.serve.schema import ChatRequest
from ray_jobs.serve.service import Service
from ray_jobs.session import session

QUESTION = "Describe the masked region in detail."


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
    cfg = Config(
        model=args.model, port=_free_port(), engine=args.engine, num_threads=args.threads, device=args.device,
        num_cpus=max(2, os.cpu_count() or 2), max_ongoing=4 * max(args.concurrency), dtype=args.dtype,
    )  # fmt: skip
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"{args.new_tokens} new tokens, pictures of {args.side} pixels")  # fmt: skip
    bodies = [_body(number, args) for number in range(args.requests)]
    service = make_service(cfg)
    os.environ.setdefault(*PROXY_CALLBACK)
    with session(cfg.num_cpus):
        url = start(cfg)
        runs = measure(service, url, bodies, args)
        end()
    service.describer.loop.close()
    report(runs, args.concurrency)


def measure(service: Service, url: str, bodies: list[dict[str, Any]], args: argparse.Namespace) -> list[Run]:
    """Every side at every concurrency. The sides take turns: a busy machine slows all of them."""
    loop = service.describer.loop
    ready = [_request(service, body, args.new_tokens) for body in bodies]

    def described(number: int) -> None:
        given = ready[number]
        loop.generate([service.describer.request(given.views_N8SS, given.query, given.sampling)])

    def read_and_described(number: int) -> None:
        loop.generate([_request(service, bodies[number], args.new_tokens)])

    described(0)
    asyncio.run(_ask(url, bodies, 1, 4, False))
    runs: dict[tuple[str, int], Run] = {}
    for clients in args.concurrency:
        for _ in range(args.rounds):
            for run in (
                _in_threads("engine", described, clients, args),
                asyncio.run(_ask(url, bodies, clients, _count(clients, args), False)),
                _in_threads("engine + reading", read_and_described, clients, args),
                asyncio.run(_ask(url, bodies, clients, _count(clients, args), True)),
            ):
                runs[run.what, clients] = run.joined(runs.get((run.what, clients)))
    return list(runs.values())


def _count(clients: int, args: argparse.Namespace) -> int:
    return max(args.requests, 4 * clients) if clients > 1 else min(args.requests, args.alone)


def _in_threads(what: str, work: Callable[[int], None], clients: int, args: argparse.Namespace) -> Run:
    times: list[float] = []

    def one(number: int) -> None:
        started = time.perf_counter()
        work(number % args.requests)
        times.append(time.perf_counter() - started)

    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        list(pool.map(one, range(_count(clients, args))))
        return Run(what=what, clients=clients, wall_s=time.perf_counter() - started, times_s=times, first_s=[])


async def _ask(url: str, bodies: list[dict[str, Any]], clients: int, count: int, stream: bool) -> Run:
    times: list[float] = []
    firsts: list[float] = []
    numbers = iter(range(count))

    async def client(http: httpx2.AsyncClient) -> None:
        for number in numbers:
            body = {**bodies[number % len(bodies)], "stream": stream}
            started = time.perf_counter()
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                waiting = stream
                async for line in answer.aiter_lines():
                    if waiting and '"content":"' in line and '"content":""' not in line:
                        firsts.append(time.perf_counter() - started)
                        waiting = False
            times.append(time.perf_counter() - started)

    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        wall_s = time.perf_counter() - started
    what = "endpoint, stream" if stream else "endpoint"
    return Run(what=what, clients=clients, wall_s=wall_s, times_s=times, first_s=firsts)


def report(runs: list[Run], concurrency: list[int]) -> None:
    """Prints the table and the two ratios that matter."""
    print("\n| what | clients | regions/s | p50 ms | p95 ms | p99 ms | first token p50 ms |")
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
            print(f"{clients} clients, against {side}: {endpoint.at(0.5) - other.at(0.5):+.1f} ms p50, "
                  f"throughput ratio {endpoint.per_s / other.per_s:.3f}")  # fmt: skip


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


def _request(service: Service, body: dict[str, Any], new_tokens: int) -> Any:
    """What the endpoint makes of a body, by the same code."""
    asked = ChatRequest.model_validate(body)
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    data = base64.b64decode(url.partition(",")[2])
    (prepared,) = service.describer.one_region(data, asked, asked).prepared
    assert prepared.views_N8SS is not None
    return service.describer.request(prepared.views_N8SS, f"<image>\n{QUESTION}", Sampling(max_new_tokens=new_tokens))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tests/data/oracle/dam_tiny/checkpoint")
    parser.add_argument("--engine", default="torch")
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
