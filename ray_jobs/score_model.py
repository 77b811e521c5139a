"""How well a model in memory describes labelled regions: MedDLC-score by the lexical judge, without any run directory.

    score_model(dam, ["phantoms/"], num_regions=100)          # {"positive": 0.93, "negative": 0.95, "average": 0.94}

For scores during training and for the small model's card. `meddam judge` scores published runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meddam_core.records import Image
from meddam_core.shards import read_shard
from meddam_core.training.examples import Example, examples_of
from meddam_core.training.looks import Look, seen
from ray_jobs.snapshot import shards_below

if TYPE_CHECKING:
    from meddam_core.judging.scores import Judged


@dataclass(frozen=True, slots=True)
class Held:
    """Held-out images with their regions as examples."""

    images: list[Image]
    """Without pictures: only facts and regions are kept."""
    examples: list[Example]


def held_out(uris: Sequence[str], size: int, num_regions: int) -> Held:
    """The first images of some shards, as many as hold `num_regions`."""
    images: list[Image] = []
    examples: list[Example] = []
    for image in _images(uris):
        found = list(examples_of(image, size))[: num_regions - len(examples)]
        examples += found
        kept = {e.region_id for e in found}
        images.append(without_picture(image, kept))
        if len(examples) >= num_regions:
            break
    return Held(images, examples)


def _images(uris: Sequence[str]) -> Iterator[Image]:
    for uri in uris:
        for shard in shards_below(uri):
            yield from read_shard(shard.uri)


def without_picture(image: Image, kept: set[int]) -> Image:
    """The image with some of its regions and no pixels."""
    from dataclasses import replace

    from meddam_core.records import EncodedImage

    regions = [r for r in image.regions if r.region_id in kept]
    return replace(image, image=EncodedImage(), preview=EncodedImage(), regions=regions)


def describe(
    dam: Any, examples: Sequence[Example], prompt: str, look: Look = "both", max_new_tokens: int = 96
) -> list[str]:
    """Greedy captions of examples, in their order."""
    from meddam_core.engines.base import Request, Sampling
    from meddam_core.engines.torch_engine import TorchEngine
    from meddam_core.prompts import load_prompt

    engine = TorchEngine(dam, max_batch=32)
    query = load_prompt(prompt).text
    requests = [
        Request(request_id=str(i), views_N8SS=seen(e.views_8SS, look)[None], query=query,
                sampling=Sampling(max_new_tokens=max_new_tokens))
        for i, e in enumerate(examples)
    ]  # fmt: skip
    texts = [result.text for result in engine.generate(requests)]
    engine.close()
    return texts


def judged(held: Held, captions: Mapping[int, str]) -> list[Judged]:
    """The lexical judge's verdict on every question about these regions."""
    from meddam_core.judging.lexical import LexicalJudge
    from meddam_core.judging.scores import Judged
    from qa_library.build import Settings, questions_of_image
    from qa_library.loader import load_library

    library = load_library()
    judge, rows = LexicalJudge(library), []
    for image in held.images:
        for question in questions_of_image(image, library, Settings()).questions:
            verdict = judge.judge(question, captions[question.region_id])
            rows.append(Judged(question, verdict, image.image_key))
    return rows


def score_model(
    dam: Any, shards: Sequence[str], num_regions: int, *, prompt: str = "meddam-v1", view: Look = "both"
) -> dict[str, float]:
    """MedDLC-score, strict, of both polarities and their mean, as shares."""
    from meddam_core.judging.scores import make_sheet, point

    held = held_out(shards, dam.config.view_size, num_regions)
    texts = describe(dam, held.examples, prompt, view)
    rows = judged(held, {e.region_id: text for e, text in zip(held.examples, texts, strict=True)})
    sheet = make_sheet(rows, strict=True)
    return {"positive": point(sheet, "positive"), "negative": point(sheet, "negative"), "average": point(sheet)}
