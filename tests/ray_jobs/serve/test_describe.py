"""Many regions of one image at once, DICOM among them; pictures for people; metrics; and what the schema says."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from PIL import Image as PilImage
from starlette.testclient import TestClient

from meddam_core.captioner import Captioner, RegionPreparer, ViewRules
from meddam_core.engines.base import Sampling
from meddam_core.engines.loop import EngineLoop
from meddam_core.imaging.decode import decode
from meddam_core.imaging.deidentify import image_fields
from meddam_core.imaging.render import render
from meddam_core.prompts import load_prompt
from meddam_core.records import Image, Region
from meddam_core.regions.promptable import RegionPrompt, load_segmenter
from ray_jobs.serve import schema
from ray_jobs.serve.app import make_app
from ray_jobs.serve.config import Config
from ray_jobs.serve.service import Service
from tests.meddam_core.regions.test_promptable import make_sam
from tests.ray_jobs.serve.conftest import MODEL, SIDE, Made, chat, picture, png, url, with_alpha

DICOM = (
    ("CT_small.dcm", "ct"),
    ("MR_small.dcm", "mr"),
    ("examples_overlay.dcm", "mr"),
    ("JPEG2000.dcm", "generic"),
    ("examples_ybr_color.dcm", "generic"),
)
BOXES = ((10, 12, 50, 40), (20, 30, 60, 64), (5, 5, 25, 60))


def bundled(name: str) -> bytes:
    return (Path(pydicom.data.__file__).parent / "test_files" / name).read_bytes()


def describe(client: TestClient, data: bytes, **more: Any) -> schema.DescribeResponse:
    body = {"image": base64.b64encode(data).decode(), "max_tokens": 10, **more}
    answer = client.post("/v1/regions:describe", json=body)
    assert answer.status_code == 200, answer.text
    return schema.DescribeResponse.model_validate(answer.json())


def in_batch(loop: EngineLoop, data: bytes, recipe: str) -> list[str | None]:
    """The captions that the batch job's own classes give the same file and boxes."""
    decoded = decode(data)
    row = Image(image_id=0, image_key="", dataset="d", recipe=recipe, **image_fields(decoded),
                regions=[Region(region_id=i, box=box) for i, box in enumerate(BOXES)])  # fmt: skip
    captioner = Captioner(loop, [load_prompt("meddam-v1")], Sampling(max_new_tokens=10))
    prepared = RegionPreparer(ViewRules(size=SIDE)).prepare(row)
    return [captions[0].text for captions in captioner.describe(prepared)]


@pytest.mark.parametrize(("name", "recipe"), DICOM)
def test_files_of_hospitals_give_the_captions_of_the_batch(
    client: TestClient, loop: EngineLoop, name: str, recipe: str
) -> None:
    found = describe(client, bundled(name), regions=[{"box": box} for box in BOXES])
    assert found.image.recipe == recipe
    assert [r.caption for r in found.regions] == in_batch(loop, bundled(name), recipe)


def test_a_broken_region_leaves_the_others_alone(client: TestClient) -> None:
    regions = [
        {"id": "a", "box": [10, 10, 50, 50]},
        {"id": "b", "box": [900, 900, 950, 950]},
        {"id": "c", "mask": {"size": [1, 2], "counts": [0, 2]}},
        {"polygon": [[5, 5], [40, 5], [20, 40]]},
    ]
    found = describe(client, png(picture()), regions=regions).regions
    assert [r.id for r in found] == ["a", "b", "c", "3"]
    assert [r.error and r.error["code"] for r in found] == [None, "box_outside", "mask_size", None]
    assert found[0].caption and found[0].confidence and 0 < found[0].confidence <= 1
    assert found[1].caption is None and found[1].box is None


def test_findings_are_looked_for_in_the_words_of_the_modality(client: TestClient) -> None:
    found = describe(client, bundled("CT_small.dcm"), regions=[{"box": BOXES[0]}], question="Is it solid?")
    assert found.regions[0].template_set == "lidc_idri"
    named = describe(client, png(picture()), regions=[{"box": BOXES[0]}], template_set="vindr_cxr")
    assert named.regions[0].template_set == "vindr_cxr"


def test_without_regions_the_alpha_or_the_detector_says_where(client: TestClient) -> None:
    (found,) = describe(client, png(with_alpha(picture(), (20, 10, 60, 50)))).regions
    assert found.box == [20, 10, 60, 50]
    skin = np.full((200, 200, 3), (214, 170, 150), np.uint8)
    skin[80:120, 90:130] = (90, 50, 40)
    (lesion,) = describe(client, png(PilImage.fromarray(skin)), recipe="skincon").regions
    assert lesion.box is not None and abs(lesion.box[0] - 84) < 15
    body = {"image": base64.b64encode(png(picture())).decode()}
    assert client.post("/v1/regions:describe", json=body).json()["error"]["code"] == "no_regions"


def test_no_more_regions_than_configured(make_client: Made) -> None:
    body = {"image": "AAAA", "regions": [{"box": [0, 0, 9, 9]}] * 3}
    answer = make_client(max_regions=2).post("/v1/regions:describe", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_regions")


def test_pictures_for_people(client: TestClient) -> None:
    body = {"image": url(bundled("CT_small.dcm"), "application/dicom"), "window": "lung"}
    shown = schema.RenderResponse.model_validate(client.post("/v1/images:render", json=body).json())
    assert (shown.image.width, shown.image.height, shown.image.modality) == (128, 128, "CT")
    assert {"lung", "bone", "three_window"} <= set(shown.image.windows)
    pixels = np.asarray(PilImage.open(io.BytesIO(base64.b64decode(shown.png.partition(",")[2]))).convert("RGB"))
    assert (pixels == render(decode(bundled("CT_small.dcm")), "lung")).all()
    assert client.post("/v1/images:render", json={**body, "window": "no such"}).status_code == 400
    mr = {"image": base64.b64encode(bundled("MR_small.dcm")).decode(), "window": "lung"}
    assert client.post("/v1/images:render", json=mr).json()["error"]["code"] == "unsupported_pixels"


def test_pixels_beyond_the_limit_are_not_decoded(make_client: Made) -> None:
    bomb = io.BytesIO()
    PilImage.new("L", (3000, 3000)).save(bomb, "PNG")
    body = {"image": base64.b64encode(bomb.getvalue()).decode(), "regions": [{"box": [0, 0, 9, 9]}]}
    answer = make_client(max_pixels=1_000_000).post("/v1/regions:describe", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_samples_can_be_described(client: TestClient) -> None:
    cards = client.get("/samples").json()["samples"]
    assert len(cards) >= 5
    for card in (cards[1], cards[-1]):
        data = client.get(f"/samples/{card['name']}").content
        boxes = card["boxes"] or [[300, 300, 500, 500]]
        found = describe(client, data, regions=[{"box": boxes[0]}], recipe=card["recipe"], frame=card["frame"])
        assert found.regions[0].caption
    assert client.get("/samples/..%2Fapp.py").status_code == 404


def test_metrics_tell_what_was_done(make_client: Made) -> None:
    client = make_client()
    describe(client, png(picture()), regions=[{"box": BOXES[0]}, {"box": BOXES[1]}])
    client.get("/v1/models/none")
    text = client.get("/metrics").text
    assert 'meddam_serve_requests_total{route="/v1/regions:describe",status="200"} 1.0' in text
    assert 'meddam_serve_captions_total{finish_reason="' in text
    tokens = next(line for line in text.splitlines() if line.startswith("meddam_serve_new_tokens_total"))
    assert 0 < float(tokens.split()[1]) <= 20
    assert 'meddam_serve_errors_total{kind="404"} 1.0' in text
    for name in (
        "meddam_serve_queue",
        "meddam_serve_batch_size",
        "meddam_serve_in_flight",
        "meddam_serve_first_token_seconds_bucket",
    ):
        assert name in text


def test_the_schema_says_what_is_accepted(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/v1/chat/completions", "/chat/completions", "/v1/regions:describe", "/v1/models"}
    request = document["components"]["schemas"]["ChatRequest"]
    assert request["additionalProperties"] is False
    assert {"box", "mask", "polygon", "points", "temperature", "seed", "length"} <= set(request["properties"])
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "408", "413", "415", "429", "503", "504"} <= set(responses) and "422" not in responses


def test_clicks_are_segmented(loop: EngineLoop, tmp_path: Path) -> None:
    """What a segmenter makes of clicks is the region: the caption is that of its mask."""
    segmenter = load_segmenter(str(make_sam(tmp_path)))
    shown = picture(5)
    (found,) = segmenter.segment(np.asarray(shown), [RegionPrompt(points=[(30.0, 20.0), (44.0, 32.0)])])
    mask = png(PilImage.fromarray(found.mask_HW * np.uint8(255)))
    service = Service(Config(model=MODEL), loop, SIDE, "dam_tiny", segmenter=segmenter)
    with TestClient(make_app(service)) as client:
        clicked = describe(client, png(shown), regions=[{"points": [[30, 20], [44, 32]]}]).regions[0]
        masked = describe(client, png(shown), regions=[{"mask": url(mask)}]).regions[0]
        body = chat(url(png(shown)), points=[[30, 20], [44, 32]], max_tokens=10)
        asked = client.post("/v1/chat/completions", json=body)
    assert found.mask_HW.any() and not found.mask_HW.all(), "a mask that shows something"
    assert (clicked.caption, clicked.box) == (masked.caption, masked.box)
    assert asked.json()["choices"][0]["meddam"]["box"] == list(masked.box or ())
