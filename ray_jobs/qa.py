"""The question table of labelled shards: `meddam qa lint | show | build`.

    meddam qa lint                                          # faults of the question library
    meddam qa show lidc_idri margin                         # an attribute: its questions, values and words
    meddam qa build s3://bucket/vindr --out s3://bucket/questions
    meddam qa build s3://bucket/runs/one --consensus --out s3://bucket/agreed   # no labels: what captions agree on

`build` reads labels and boxes, never pixels, a shard at a time in a process a core. Each shard gives one file of
questions whose content follows from the shard, the library and the seed alone; summary.json, which counts what was not
asked and why, comes last. Run again after a failure: finished files are made again, to the same bytes.

A question is asked only if the rendering can show it, so the rendering is read off the rows: the recipe's window, or
the one that `--window` forces on a run, or the row's own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from operator import itemgetter
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.datasets.recipes import get_recipe
from meddam_core.imaging.windows import PRESETS, THREE_WINDOW
from meddam_core.judging.statements import consensus
from meddam_core.records import Image, Label, Region, Window
from meddam_core.shards import read_shard
from qa_library.build import ImageRow, Settings, questions_of_image
from qa_library.loader import Library, load_library
from qa_library.schema import Rendering
from ray_jobs.fingerprint import differences, inputs_digest
from ray_jobs.module_command import run_as
from ray_jobs.question_files import SUMMARY, write_questions
from ray_jobs.run_directory import RUN, RunDirectory
from ray_jobs.snapshot import snapshot

COLUMNS = ["image_id", "image_key", "dataset", "recipe", "modality", "window", "width", "height", "regions", "labels"]
CAPTIONS = "/captions/gen="
"""Part of the path of a run's published captions, which no shard has."""
RUN_COLUMNS = ["image_id", "dataset", "modality", "recipe", "region_id", "box", "labels"]
"""What questions depend on; the pictures stay where they are."""
CONSENSUS_COLUMNS = [c for c in RUN_COLUMNS if c != "labels"] + ["status", "text"]
"""With --consensus: what is known of a region is not even read."""


class Config(BaseModel):
    """Make the question table of labelled shards: about eight questions a region, by the question library."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of image shards (or single .parquet files), on S3 or disk; or finished runs that detected regions."""
    out: str
    """Where the question table goes, on S3 or disk."""
    seed: int = 0
    """Chooses among the questions that could be asked."""
    max_positives: int = Field(4, ge=1)
    """Positive questions a region, at most; as many negatives."""
    min_trust: float = Field(0.5, ge=0, le=1)
    """Labels that a smaller share of the readers agrees on are undecided, and not asked in either polarity."""
    scale_given: bool = False
    """The captioner was told the size of a pixel, so that sizes can be asked."""
    window: str | None = None
    """The window that the caption run forces on all images (its --window), if it does."""
    template_sets: dict[str, str] = {}
    """Template set by dataset, where the dataset's name alone does not tell: {my-set: vindr_cxr}."""
    library: str | None = None
    """Folder of a lab's own templates, added to the shipped ones."""
    consensus: bool = False
    """Runs only: take for a region's labels what most of its captions state; its own labels are not read."""
    wording: Literal["usual", "held-out"] = "usual"
    """held-out: ask in words that are kept for tests."""
    num_cpus: int | None = Field(None, ge=1)
    """Processes at once; by default one a core."""


class Summary(BaseModel):
    """What was asked, and what was not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    num_images: int
    num_regions: int
    num_questions: int
    by_polarity: dict[str, int]
    by_dataset: dict[str, int]
    by_source: dict[str, int]
    dropped: list[tuple[str, str, int]]
    """(reason, attribute or label, how often), most often first."""
    library: str
    fingerprint: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """What the process ends with: a table without a question is of no use."""
        return 0 if self.num_questions else 3

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        a_region = self.num_questions / self.num_regions if self.num_regions else 0.0
        kinds = ", ".join(f"{n:,} {p}" for p, n in sorted(self.by_polarity.items()))
        text = [f"{self.num_questions:,} questions about {self.num_regions:,} regions, {a_region:.1f} each: {kinds}"]
        text += [f"  {n:>8,}  {dataset}" for dataset, n in sorted(self.by_dataset.items())]
        if self.dropped:
            text.append("not asked:")
            text += [f"  {n:>8,}  {reason}: {_about(reason, what)}" for reason, what, n in self.dropped[:12]]
            if len(self.dropped) > 12:
                text.append(f"  and {len(self.dropped) - 12} further reasons, in {SUMMARY}")
        return text


_WHY = {
    "no_template_set": "no template set fits the dataset {}",
    "no_finding": "regions without a finding among {}",
    "limit": "more {} questions than were wanted",
    "not_shown": "{} cannot be seen in this rendering",
    "no_scale": "{} needs a scale in mm",
    "no_side": "{} of structures in the midline",
    "not_asked": "values of {} that no question can decide",
    "hierarchy": "{} held by, or holding, what is there",
}


def _about(reason: str, what: str) -> str:
    return _WHY[reason].format(what) if reason in _WHY else what


def run(cfg: Config) -> Summary:
    """Writes the table. Raises ValueError where the shards, the library or an earlier table at `out` do not fit."""
    sources, digest = _sources(cfg.shards)
    if cfg.consensus and not all(CAPTIONS in s for s in sources):
        raise ValueError("--consensus is about what captions say: give finished runs of `meddam caption`, no shards")
    fingerprint = _fingerprint(cfg, digest)
    earlier = storage.join(cfg.out, SUMMARY)
    if storage.exists(earlier):
        found = Summary.model_validate_json(storage.read_bytes(earlier))
        if changed := differences(found.fingerprint, fingerprint):
            listed = "\n".join(f"  {c}" for c in changed)
            raise ValueError(f"{cfg.out} holds another question table:\n{listed}\nGive another --out.")
        return found
    storage.check_writable(cfg.out)
    jobs = [(cfg, s, storage.join(cfg.out, "questions", f"questions-{i:06d}.parquet")) for i, s in enumerate(sources)]
    total: Counter[tuple[str, str, str]] = Counter()
    for counts in _mapped(jobs, min(len(jobs), cfg.num_cpus or os.cpu_count() or 1)):
        total += counts
    summary = _summary(cfg, total, fingerprint)
    storage.write_bytes(earlier, summary.model_dump_json(indent=2).encode() + b"\n")
    return summary


def _mapped(jobs: list[tuple[Config, str, str]], processes: int) -> Iterator[Counter[tuple[str, str, str]]]:
    if processes == 1:
        yield from map(_build_shard, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_build_shard, jobs)


def _build_shard(job: tuple[Config, str, str]) -> Counter[tuple[str, str, str]]:
    """Writes the questions of one shard; returns counts by (kind of count, name, name)."""
    cfg, shard, out = job
    library = load_library(cfg.library)
    settings = Settings(
        seed=cfg.seed, max_positives=cfg.max_positives, min_trust=cfg.min_trust, scale_given=cfg.scale_given,
        template_sets=cfg.template_sets, held_out=cfg.wording == "held-out",
    )  # fmt: skip
    counts: Counter[tuple[str, str, str]] = Counter()
    questions = []
    for image in _agreed(shard, library, cfg.template_sets) if cfg.consensus else _images(shard):
        shown = rendering(image, cfg.window)
        known = replace(settings, renderings={image.recipe: shown}) if shown else settings
        table = questions_of_image(image, library, known)
        questions += table.questions
        counts["images", "", ""] += 1
        counts["regions", "", ""] += table.num_regions
        counts.update({("dropped", *key): n for key, n in table.dropped.items()})
        for question in table.questions:
            counts["polarity", question.polarity, ""] += 1
            counts["dataset", question.dataset, ""] += 1
            counts["source", question.source, ""] += 1
    if questions:
        write_questions(out, questions)
    return counts


def _sources(uris: Sequence[str]) -> tuple[list[str], str]:
    """(URIs of shards, or of the caption files of runs, and a digest of what they hold)."""
    shards = [uri for uri in uris if not storage.exists(storage.join(uri, RUN))]
    found = snapshot(shards, finished=True) if shards else []
    sources, digest = [s.uri for s in found], inputs_digest(found)
    for uri in uris:
        if uri in shards:
            continue
        files = RunDirectory(uri).published()
        if files is None:
            raise ValueError(f"{uri} is a run that is not complete yet: run `meddam caption` again first")
        sources += files
        digest = hashlib.sha256("\n".join([digest, *files]).encode()).hexdigest()
    return sources, digest


@dataclass(slots=True)
class _Captioned:
    """An image of a run, as its captions describe it."""

    image_id: int
    dataset: str
    modality: str
    recipe: str
    window: Window | None = None
    regions: list[Region] = field(default_factory=list)


def _images(source: str) -> Iterator[Image | _Captioned]:
    """The labelled rows of a shard, or of a file of published captions."""
    if CAPTIONS not in source:
        yield from read_shard(source, columns=COLUMNS, batch_rows=256)
        return
    for rows in _by_image(source, RUN_COLUMNS):
        image = _captioned(rows[0])
        for row in rows:  # the captions of a region stand together
            if all(r.region_id != row["region_id"] for r in image.regions):
                labels = [Label(**label) for label in row["labels"] or []]
                image.regions.append(Region(region_id=row["region_id"], box=tuple(row["box"]), labels=labels))
        yield image


def _agreed(source: str, library: Library, template_sets: dict[str, str]) -> Iterator[_Captioned]:
    """The captioned rows of a run, with what most captions of a region say for its labels."""
    for rows in _by_image(source, CONSENSUS_COLUMNS):
        image = _captioned(rows[0])
        named = template_sets.get(image.dataset)
        template_set = library.sets.get(named) if named else library.find(image.dataset, image.modality)
        for region_id, found in itertools.groupby(rows, key=itemgetter("region_id")):
            members = list(found)
            said = [r["text"] for r in members if r["status"] == "ok" and r["text"]]
            labels = consensus(template_set, said) if template_set is not None and said else []
            image.regions.append(Region(region_id=region_id, box=tuple(members[0]["box"]), labels=labels))
        yield image


def _captioned(row: dict[str, Any]) -> _Captioned:
    return _Captioned(row["image_id"], row["dataset"], row["modality"], row["recipe"])


def _by_image(source: str, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each image of a file of published captions, which stand together."""
    fs, path = storage.open_uri(source)
    with fs.open_input_file(path) as stream:
        batches = pq.ParquetFile(stream).iter_batches(4096, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        for _, members in itertools.groupby(rows, key=itemgetter("image_id")):
            yield list(members)


def rendering(image: ImageRow, window: str | None = None) -> Rendering | None:
    """What the caption job's rendering of this row can show: by the run's or the recipe's window, then the row's.

    None where the picture has no window (photographs), or where it is chosen from the pixels.
    """
    name = window or get_recipe(image.recipe).window
    if name == THREE_WINDOW:
        return "three-window"
    if image.modality != "CT" or (name is None and image.window is None):
        return None
    shown = PRESETS[name] if name is not None else image.window
    assert shown is not None
    if shown.center <= -250:
        return "lung"
    return "bone" if shown.center >= 250 or shown.width >= 1200 else "soft-tissue"


def _fingerprint(cfg: Config, inputs: str) -> dict[str, Any]:
    if cfg.window is not None and cfg.window != THREE_WINDOW and cfg.window not in PRESETS:
        raise ValueError(f"there is no window {cfg.window!r}; use {THREE_WINDOW}, {', '.join(PRESETS)}")
    names = ["seed", "max_positives", "min_trust", "scale_given", "window", "template_sets"]
    names += ["consensus"] if cfg.consensus else []  # older tables, which knew of neither, stay what they are
    names += ["wording"] if cfg.wording != "usual" else []
    return {
        "inputs": inputs, "library": load_library(cfg.library).version,
        **json.loads(cfg.model_dump_json(include=set(names))),
    }  # fmt: skip


def _summary(cfg: Config, total: Counter[tuple[str, str, str]], fingerprint: dict[str, Any]) -> Summary:
    def named(kind: str) -> dict[str, int]:
        return {name: n for (k, name, _), n in sorted(total.items()) if k == kind}

    dropped = sorted(((r, what, n) for (k, r, what), n in total.items() if k == "dropped" and n), key=lambda d: -d[2])
    return Summary(
        out=cfg.out, num_images=total["images", "", ""], num_regions=total["regions", "", ""],
        num_questions=sum(named("polarity").values()), by_polarity=named("polarity"), by_dataset=named("dataset"),
        by_source=named("source"), dropped=dropped,
        library=str(fingerprint["library"]), fingerprint=fingerprint,
    )  # fmt: skip


if __name__ == "__main__":  # the same options as `meddam qa`
    run_as("qa")
