"""Malformed bodies by the hundred: each gets a 4xx in OpenAI's shape, nothing crashes, and memory comes back."""

from __future__ import annotations

import ctypes
import gc
import gzip
import io
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage
from starlette.testclient import TestClient

from tests.ray_jobs.serve.conftest import Made, chat, picture, png, url, with_alpha

SEED = 7
PICTURE = picture()
RGBA = png(with_alpha(PICTURE))
Body = tuple[str, bytes]
"""Path and content."""
CHAT, DESCRIBE, RENDER = "/v1/chat/completions", "/v1/regions:describe", "/v1/images:render"
WRONG: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, 10**30, "", "x", "\x00", "\ud83d", [], [[]], {}, {"a": 1}, "9" * 5000,
]  # fmt: skip
URLS = ("http://169.254.169.254/", "file:///etc/passwd", "data:,x", "data:image/png;base64,", "data:;base64,%%%", "//x")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims, and partly holds, a picture of width x height."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000), 9)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )


def truncated(rng: random.Random) -> Body:
    cut = url(RGBA)[: rng.randrange(10, len(url(RGBA)) - 5)]
    return CHAT, dump(chat(cut))


def broken_file(rng: random.Random) -> Body:
    data = bytearray(RGBA)
    for _ in range(rng.randrange(1, 30)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return CHAT, dump(chat(url(bytes(data)), box=[10, 10, 1e-9, 5]))


@cache
def bombs_of_all_kinds() -> list[bytes]:
    return [
        bomb(60_000, 60_000), bomb(1, 2_000_000_000), bomb(0, 5), gzip.compress(bytes(30_000_000)),
        gzip.compress(gzip.compress(bytes(10_000_000))), b"\x00" * 128 + b"DICM" + bytes(500), b"II*\x00" + bytes(64),
    ]  # fmt: skip


def bombs(rng: random.Random) -> Body:
    data = rng.choice(bombs_of_all_kinds())
    where = rng.choice([{}, {"box": [0, 0, 9, 9]}])
    return rng.choice([(CHAT, dump(chat(url(data), **where))), (RENDER, dump({"image": url(data)}))])


def regions(rng: random.Random) -> Body:
    wrong: Any = rng.choice([
        {"mask": {"size": [70, 90], "counts": [6300]}}, {"mask": {"size": [70, 90], "counts": "0" * 50}},
        {"mask": {"size": [65535, 65535], "counts": [1 << 31, 1 << 31]}}, {"mask": {"size": [9, 9], "counts": [0, 81]}},
        {"mask": "AAAA"}, {"mask": url(bomb(50_000, 50_000))}, {"mask": url(png(PilImage.new("L", (5, 5), 255)))},
        {"mask": url(png(PilImage.new("L", PICTURE.size, 0)))}, {"box": [50, 50, 10, 10]}, {"box": [-9e5, 0, 9e5, 1]},
        {"box": [0, 0, 1]}, {"polygon": [[0, 0], [1, 1]]}, {"polygon": [[-1e6, 0], [1e6, 0], [0, 1e6]]},
        {"polygon": [[5, 5]] * 9}, {"points": [[-1, 5]]}, {"points": []}, {"box": [1, 1, 2, 2], "points": [[5, 5]]},
    ])  # fmt: skip
    if rng.random() < 0.5:
        return CHAT, dump(chat(url(png(PICTURE)), **wrong))
    return DESCRIBE, dump({"image": url(png(PICTURE)), "regions": [{**wrong, "id": 5}]})


def nan(rng: random.Random) -> Body:
    word = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "0x10", "01", "--1", "1_000", ".5", "nan"])
    return CHAT, dump(chat(url(png(PICTURE)), box=[0, 0, 9, 123456])).replace(b"123456", word.encode())


def nested(rng: random.Random) -> Body:
    depth = rng.choice([300, 1_000, 10_000, 200_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"messages":[', b"]}")])
    return rng.choice([CHAT, DESCRIBE]), opening * depth + b"1" + closing * rng.choice([depth, 0])


def wrong_field(rng: random.Random) -> Body:
    body = chat(url(RGBA))
    name = rng.choice(["model", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "seed", "box",
                       "mask", "frame", "recipe", "window", "prompt", "length", "template_set", "response_format",
                       "stream_options", "logprobs", "unknown", "top_k", "margin"])  # fmt: skip
    body[name] = rng.choice(WRONG)
    return CHAT, dump(body)


def wrong_message(rng: random.Random) -> Body:
    parts: list[Any] = [
        {"type": "image_url", "image_url": rng.choice(WRONG)},
        {"type": "text", "text": rng.choice(WRONG)},
        {"type": "input_audio", "data": ""},
        rng.choice(WRONG),
        {"type": "image_url", "image_url": {"url": rng.choice(URLS)}},
    ]
    part = rng.choice(parts)
    content: Any = rng.choice([[part], [part] * 30, rng.choice(WRONG)])
    turn = {"role": rng.choice(["user", "tool", None, 5]), "content": content}
    return CHAT, dump({**chat(url(RGBA)), "messages": [turn]})


@cache
def crowds() -> list[Body]:
    whole = chat(url(RGBA))
    return [
        (CHAT, dump({**whole, "polygon": [[1, 2]] * 80_000})),
        (DESCRIBE, b'{"image":"","regions":[' + b"[]," * 900_000),
        (DESCRIBE, dump({"image": "", "regions": [{"box": ["x"] * 4}] * 5_000})),
        (CHAT, b"[" + b"1," * 600_000 + b"1]"),
        (CHAT, dump({**whole, "mask": {"size": [70, 90], "counts": ["x"] * 200_000}})),
        (CHAT, dump({**whole, **{f"field{i}": i for i in range(50_000)}})),
    ]


def many(rng: random.Random) -> Body:
    return rng.choice(crowds())


def noise(rng: random.Random) -> Body:
    whole = bytearray(dump(chat(url(RGBA), text="What is it?")))
    for _ in range(rng.randrange(1, 20)):
        at = rng.randrange(len(whole))
        whole[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return rng.choice([CHAT, DESCRIBE, RENDER]), bytes(whole[: rng.choice([None, rng.randrange(len(whole))])])


def huge(rng: random.Random) -> Body:
    return CHAT, b'{"model":"' + b"x" * 3_000_000


KINDS: tuple[Callable[[random.Random], Body], ...] = (
    truncated, broken_file, bombs, regions, nan, nested, wrong_field, wrong_message, many, noise, huge,
)  # fmt: skip


def dump(body: Any) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


def bodies(count: int) -> Iterator[Body]:
    rng = random.Random(SEED)
    for number in range(count):
        yield KINDS[number % len(KINDS)](rng)


def send(client: TestClient, count: int) -> Counter[int]:
    """Statuses of so many malformed bodies; each error is checked."""
    statuses: Counter[int] = Counter()
    for path, content in bodies(count):
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (path, content[:300], answer.text)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1500
    return statuses


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_few_of_each_kind(make_client: Made) -> None:
    statuses = send(make_client(max_body_mb=2.5, max_tokens=2, most_tokens=2), 7 * len(KINDS))
    assert statuses[400] > 35 and statuses[413] > 5, statuses


@pytest.mark.slow
def test_a_thousand_and_the_memory_comes_back(make_client: Made) -> None:
    client = make_client(max_tokens=2, most_tokens=2)
    assert sum(send(client, 300).values()) == 300
    before = resident_bytes()
    statuses = send(client, 1100)
    assert statuses[400] > 700
    content = iter([b" " * 1_000_000] * 100)
    # only the status is kept: an answer of this client holds its request
    assert client.post(CHAT, content=content, headers={"Content-Type": "application/json"}).status_code == 413
    assert client.post(CHAT, json=chat(url(RGBA))).status_code == 200
    assert resident_bytes() - before < 64 << 20


def test_other_kinds_of_content(client: TestClient) -> None:
    whole = dump(chat(url(RGBA)))
    for kind in ("text/plain", "multipart/form-data; boundary=x", "", "application/xml"):
        answer = client.post(CHAT, content=whole, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    with_charset = client.post(CHAT, content=whole, headers={"Content-Type": "application/json; charset=utf-8"})
    assert with_charset.status_code == 200
    assert client.post(CHAT, content=b"", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.get(CHAT).status_code == 405
    assert client.post("/v1/nowhere", content=b"{}").status_code == 404
    sink = io.BytesIO()
    PICTURE.save(sink, "JPEG")
    assert client.post(CHAT, json=chat(url(sink.getvalue()))).json()["error"]["code"] == "no_regions"
