"""Shards of labelled nodules with made-up pixels, and captions of them: for jobs that judge and compare."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from meddam_core.judging.controls import LabelledRegion, truth_captions
from meddam_core.records import EncodedImage, Image, Label, Region, image_id, region_id
from meddam_core.shards import write_shard
from qa_library import load_library
from tests.ray_jobs.made_shards import png

SIDE_PX = 64


def nodule_labels(rng: np.random.Generator) -> list[Label]:
    """A nodule whose every grade is decided."""
    grades = {"spiculation": "15", "lobulation": "15", "margin": "15", "texture": "135", "sphericity": "35"}
    return [Label(name=name, value=str(rng.choice(list(values))), trust=1.0) for name, values in grades.items()]


def make_nodule_shards(folder: Path, num_images: int, *, seed: int = 0) -> list[Image]:
    """Writes one shard below `folder`, two nodules an image, each image a patient; returns its rows."""
    rng = np.random.default_rng(seed)
    images = []
    for row in range(num_images):
        ident = image_id(0, row)
        pixels = png(rng.integers(0, 255, (SIDE_PX, SIDE_PX, 3), np.uint8))
        regions = [
            Region(region_id=region_id(ident, i), box=(5 + 30 * i, 10, 25 + 30 * i, 30), labels=nodule_labels(rng))
            for i in range(2)
        ]
        images.append(
            Image(
                image_id=ident, image_key=f"key-{row}", patient_key=f"patient-{row}", dataset="lidc-idri",
                recipe="generic", modality="CT", image=EncodedImage(bytes=pixels), preview=EncodedImage(bytes=pixels),
                width=SIDE_PX, height=SIDE_PX, licence="CC BY 3.0", egress="open", regions=regions,
            )
        )  # fmt: skip
    write_shard(str(folder / "shards/shard-000000.parquet"), images)
    return images


def truths(images: Iterable[Image]) -> dict[int, str]:
    """Captions made from the labels, by region."""
    known = [LabelledRegion(r.region_id, i.dataset, i.modality, r.labels) for i in images for r in i.regions]
    return truth_captions(known, load_library())


def write_table(path: Path, captions: Mapping[int, str]) -> str:
    """Captions as a CSV for `meddam captions import`; returns its path."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["region_id", "text"])
        writer.writerows(captions.items())
    return str(path)
