"""Chat completions as clients see them: DAM's alpha mask, regions in fields, streams, clips, questions, errors."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from starlette.testclient import TestClient

from meddam_core.engines.base import Request, Sampling
from meddam_core.engines.loop import EngineLoop
from meddam_core.focal import focal_views
from meddam_core.prompts import load_prompt
from ray_jobs.serve import schema
from tests.ray_jobs.serve.conftest import SIDE, chat, message, picture, png, url, with_alpha

BOX = (20, 10, 60, 50)
PICTURE = picture()
RGB = url(png(PICTURE))
RGBA = url(png(with_alpha(PICTURE, BOX)))
MASK = np.zeros((70, 90), np.uint8)
MASK[10:50, 20:60] = 1


def post(client: TestClient, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return schema.ChatCompletion.model_validate(answer.json()).model_dump()


def text(client: TestClient, body: dict[str, Any]) -> str:
    return str(post(client, body)["choices"][0]["message"]["content"])


def events(client: TestClient, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def reference(loop: EngineLoop, query: str, masks: int = 1, **sampling: Any) -> Any:
    """What the engine says of the masked picture, with no server about it."""
    views = np.stack([focal_views(np.asarray(PICTURE), MASK, SIDE)] * masks)
    request = Request(request_id="ref", views_N8SS=views, query=query, sampling=Sampling(**sampling))
    return loop.generate([request])[0]


def test_the_mask_in_alpha_is_what_dams_own_server_would_see(client: TestClient, loop: EngineLoop) -> None:
    wanted = reference(loop, "<image>\nDescribe the masked region in detail.", max_new_tokens=12)
    for asked in ("\nDescribe the masked region in detail.", "<image>\nDescribe the masked region in detail.",
                  "Image: <image>\nDescribe the masked region in detail."):  # fmt: skip
        answer = post(client, chat(RGBA, text=asked))
        assert answer["choices"][0]["message"]["content"] == wanted.text
    assert answer["usage"]["completion_tokens"] == len(wanted.token_ids)
    assert answer["usage"]["prompt_tokens"] == wanted.num_prompt_tokens
    assert answer["choices"][0]["finish_reason"] == wanted.finish_reason
    assert answer["choices"][0]["meddam"]["box"] == list(BOX)
    assert answer["choices"][0]["meddam"]["mean_logprob"] == pytest.approx(wanted.mean_logprob)


def test_every_way_to_say_where_is_the_same_region(client: TestClient) -> None:
    counts = {"size": [70, 90], "counts": _counts(MASK)}
    x0, y0, x1, y1 = BOX
    ways: list[dict[str, Any]] = [
        {"mask": counts}, {"mask": base64.b64encode(png(PilImage.fromarray(MASK * 255))).decode()},
        {"mask": url(png(PilImage.fromarray(MASK * 255)))}, {"box": BOX, "margin": 0},
        {"polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]},
    ]  # fmt: skip
    texts = {text(client, chat(RGB, text="What is it?", **way)) for way in ways}
    assert texts == {text(client, chat(RGBA, text="What is it?"))}
    assert text(client, chat(RGB, text="What is it?", box=(0, 0, 30, 30))) not in texts


def _counts(mask_HW: Any) -> list[int]:
    flat = mask_HW.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))) if flat.any() else []
    edges = [0, *changes, flat.size]
    return [int(v) for v in np.diff(edges)]


def test_a_click_stands_for_a_disc(client: TestClient) -> None:
    box = post(client, chat(RGB, points=[[40, 30]]))["choices"][0]["meddam"]["box"]
    assert box == [36, 26, 45, 35]
    assert client.post("/v1/chat/completions", json=chat(RGB, points=[[95, 30]])).status_code == 400


def test_without_a_question_the_configured_prompt_is_asked(client: TestClient, loop: EngineLoop) -> None:
    wanted = reference(loop, load_prompt("meddam-v1").text, max_new_tokens=12).text
    assert text(client, chat(RGBA)) == text(client, chat(RGBA, prompt="meddam-v1")) == wanted
    short = text(client, chat(RGBA, length="keyword"))
    assert short == reference(loop, load_prompt("meddam-v1+keyword").text, max_new_tokens=12).text != wanted
    question = "<image>\nIs the margin spiculated?\nAnswer with one complete sentence of at most thirty words."
    wanted = reference(loop, question, max_new_tokens=12).text
    assert text(client, chat(RGBA, text="Is the margin spiculated?", length="sentence")) == wanted


def test_eight_frames_are_a_clip(client: TestClient, loop: EngineLoop) -> None:
    wanted = reference(loop, load_prompt("dam-video").text, 8, max_new_tokens=12).text
    assert text(client, chat(*[RGBA] * 8)) == wanted
    asked = load_prompt("dam-video").text.partition("\n")[2]
    assert text(client, chat(*[RGBA] * 8, text=asked)) == wanted
    assert text(client, chat(*[RGB] * 8, box=BOX, margin=0)) == wanted
    answer = client.post("/v1/chat/completions", json=chat(RGBA, RGBA))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_number_of_images")


def test_sampling_fields_are_honoured(client: TestClient, loop: EngineLoop) -> None:
    warm = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 7}
    wanted = reference(loop, "<image>\nWhat?", max_new_tokens=12, **warm).text
    assert text(client, chat(RGBA, text="What?", **warm)) == wanted
    assert text(client, chat(RGBA, text="What?", **{**warm, "seed": 8})) != wanted
    three = post(client, chat(RGBA, text="What?", n=3, **warm))["choices"]
    assert three[0]["message"]["content"] == wanted
    assert len({c["message"]["content"] for c in three}) == 3
    assert post(client, chat(RGBA, max_tokens=3))["usage"]["completion_tokens"] == 3
    assert post(client, {**chat(RGBA), "max_completion_tokens": 2})["choices"][0]["finish_reason"] == "length"
    whole = text(client, chat(RGBA, text="What?"))
    assert text(client, chat(RGBA, text="What?", stop=[whole[5:9]])) == whole[: whole.index(whole[5:9])].strip()


def test_a_stream_is_the_caption_in_pieces(client: TestClient) -> None:
    body = chat(RGBA, text="What is it?", stream_options={"include_usage": True})
    whole = post(client, {k: v for k, v in body.items() if k != "stream_options"})
    *chunks, usage = events(client, body)
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        == whole["choices"][0]["message"]["content"]
    )
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["choices"][0]["meddam"]["box"] == list(BOX)
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]


def test_dams_own_path_streams_lists_of_parts(client: TestClient) -> None:
    body = chat(RGBA, text="\nDescribe the masked region in detail.", model="DAM-3B", use_cache=True, num_beams=1)
    wanted = client.post("/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    found = ""
    for chunk in events(client, body, "/chat/completions"):
        for piece in chunk["choices"][0]["delta"].get("content", []):  # as examples/query_dam_server.py reads it
            if piece["type"] == "text":
                found += piece["text"]
    assert found == wanted != ""


def test_of_a_conversation_the_last_question_counts(client: TestClient) -> None:
    turns = [*message(RGBA, text="Describe it."), {"role": "assistant", "content": "A nodule."},
             {"role": "user", "content": "Is it solid?"}]  # fmt: skip
    assert text(client, {**chat(RGBA), "messages": turns}) == text(client, chat(RGBA, text="Is it solid?"))
    system = [{"role": "system", "content": "Be brief."}, *message(RGBA, text="Is it solid?")]
    assert text(client, {**chat(RGBA), "messages": system}) == text(client, chat(RGBA, text="Be brief.\nIs it solid?"))


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"messages": []}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": "hello"}]}, 400, "no_image"),
        ({"messages": message(RGB)}, 400, "no_regions"),
        ({"messages": message("https://example.org/a.png")}, 400, "url_not_allowed"),
        ({"messages": message("file:///etc/passwd")}, 400, "url_not_allowed"),
        ({"messages": message("data:image/png;base64,iVBORw0KG"), "box": BOX}, 400, "invalid_base64"),
        ({"messages": message(url(b"hello")), "box": BOX}, 400, "not_an_image"),
        ({"messages": message(url(png(PICTURE)[:200])), "box": BOX}, 400, "corrupt"),
        ({"messages": message(url(png(with_alpha(PICTURE, (0, 0, 0, 0)))))}, 400, "mask_empty"),
        ({"box": [5, 5, 5, 9]}, 400, "box_empty"),
        ({"box": [500, 500, 900, 900]}, 400, "box_outside"),
        ({"box": BOX, "polygon": [[0, 0], [9, 0], [9, 9]]}, 400, "invalid_value"),
        ({"mask": {"size": [7, 9], "counts": [63]}}, 400, "mask_size"),
        ({"mask": {"size": [70, 90], "counts": [6300]}}, 400, "mask_empty"),
        ({"temperature": -1}, 400, "invalid_value"),
        ({"temprature": 1}, 400, "invalid_value"),
        ({"frequency_penalty": 1}, 400, "invalid_value"),
        ({"window": "lung", "recipe": "no such"}, 400, None),
        ({"prompt": "../../etc/passwd"}, 400, None),
        ({"prompt": "tests/conftest.py"}, 400, None),
        ({"template_set": "nothing"}, 400, None),
        ({"messages": message(RGBA, text="Look <image> here")}, 400, None),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(
    client: TestClient, change: dict[str, Any], status: int, code: str | None
) -> None:
    answer = client.post("/v1/chat/completions", json={**chat(RGBA), **change})
    assert answer.status_code == status, answer.text
    error = schema.ErrorBody.model_validate(answer.json()).error
    assert error.code == code
    assert error.type == ("not_found_error" if status == 404 else "invalid_request_error")
    assert "Traceback" not in answer.text and ";base64," not in error.message


def test_a_prompt_beyond_the_context_is_the_requests_fault(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=chat(RGBA, text="word " * 3900))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_models(client: TestClient) -> None:
    (card,) = schema.ModelList.model_validate(client.get("/v1/models").json()).data
    assert card.id == "dam_tiny"
    assert client.get("/v1/models/dam_tiny").json()["id"] == "dam_tiny"
    assert client.get("/v1/models/other").status_code == 404
