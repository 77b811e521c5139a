"""The app of one replica in this process, over the small oracle checkpoint; no Ray."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image as PilImage
from starlette.testclient import TestClient

from meddam_core.dam.checkpoint import load_dam
from meddam_core.engines.loop import EngineLoop
from meddam_core.engines.torch_engine import TorchEngine
from ray_jobs.serve.app import make_app
from ray_jobs.serve.config import Config
from ray_jobs.serve.service import Service

MODEL = "tests/data/oracle/dam_tiny/checkpoint"
SIDE = 112
Made = Callable[..., TestClient]


def picture(seed: int = 0, size: tuple[int, int] = (90, 70)) -> PilImage.Image:
    """An RGB picture of coloured tiles; `size` is (width, height)."""
    width, height = size
    tiles = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return PilImage.fromarray(np.kron(tiles, np.ones((8, 8, 1), np.uint8))[:height, :width])


def png(image: PilImage.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def with_alpha(image: PilImage.Image, box: tuple[int, int, int, int] = (20, 10, 60, 50)) -> PilImage.Image:
    """The picture with a box as its alpha channel, as DAM's clients send it."""
    alpha = PilImage.new("L", image.size, 0)
    alpha.paste(255, box)
    return PilImage.merge("RGBA", (*image.split()[:3], alpha))


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def message(*urls: str, text: str = "") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


def chat(*urls: str, text: str = "", **more: Any) -> dict[str, Any]:
    return {"model": "meddam", "messages": message(*urls, text=text), "max_tokens": 12, **more}


@pytest.fixture(scope="session")
def loop() -> Iterator[EngineLoop]:
    made = EngineLoop(TorchEngine(load_dam(MODEL), max_batch=8))
    yield made
    made.close()


@pytest.fixture
def make_client(loop: EngineLoop) -> Iterator[Made]:
    """Clients of apps with settings of their own, all on the same engine."""
    with ExitStack() as stack:

        def make(ledger: Any = None, **settings: Any) -> TestClient:
            service = Service(Config(model=MODEL, **settings), loop, SIDE, "dam_tiny", ledger=ledger)
            return stack.enter_context(TestClient(make_app(service), raise_server_exceptions=False))

        yield make


@pytest.fixture
def client(make_client: Made) -> TestClient:
    return make_client()


@pytest.fixture
def serve_http(loop: EngineLoop) -> Iterator[Callable[..., str]]:
    """Addresses of apps with settings of their own behind a real HTTP server on loopback."""
    with ExitStack() as stack:

        def start(**settings: Any) -> str:
            service = Service(Config(model=MODEL, **settings), loop, SIDE, "dam_tiny")
            server = uvicorn.Server(
                uvicorn.Config(make_app(service), host="127.0.0.1", port=0, log_config=None, lifespan="on")
            )
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.01)
            return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

        yield start
