"""A dataset -> image shards: de-identified pixels and regions, one image a row, on S3 or disk.

    meddam ingest manifest list.jsonl --out s3://bucket/films
    meddam ingest coco instances_val2017.json --images val2017 --out s3://bucket/coco
    meddam ingest phantoms --count 300 --out s3://bucket/phantoms
    meddam ingest pydicom-samples --out samples

Run the same command again after any failure: shards that are there are kept. Exit codes: 0 complete, 2 the
configuration cannot work (nothing was done), 3 no image could be read, 5 another driver is at it.

Layout: `shards/*.parquet`, `rejected/*.parquet` (what became no row, by reason), `dataset.json` (counts; written last).

Keys: patients and studies are HMACs with the secret in MEDDAM_SECRET or --secret-file. Without one they are left out,
and image keys are HMACs with a random secret that is thrown away at the end: they say nothing, and differ at the next
ingest. Until then `_work` holds the paths of the source's files.

Invariants:
- the driver holds one work part and counts, never rows; a task holds one part's items and one row group of pixels;
- the same source and config give the same shards, whatever the number of workers and however often it was interrupted;
- what is wrong with one file or region is a reject with a reason; the job goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from meddam_core import storage
from meddam_core.datasets.base import Source
from meddam_core.datasets.prompted import Prompted
from meddam_core.datasets.recipes import AUTO, get_recipe
from meddam_core.datasets.rows import RowRules
from meddam_core.imaging.deidentify import keyed_hash
from meddam_core.imaging.limits import Limits
from meddam_core.records import SCHEMA_VERSION, Egress
from ray_jobs.crosswalk import check_place, write_crosswalk
from ray_jobs.dataset_files import DATASET, PLAN
from ray_jobs.ingest_config import Config, LidcIdriConfig
from ray_jobs.ingest_parts import IngestPart, PartCounts, write_parts
from ray_jobs.ingest_splits import deal_splits
from ray_jobs.lease import Lease, give_way
from ray_jobs.module_command import run_as
from ray_jobs.region_table import RegionSummary, write_region_table
from ray_jobs.session import session

logger = logging.getLogger(__name__)

VERSION = 1
"""Of what an ingest means; another one gives other shards for the same source."""
SECRET = "MEDDAM_SECRET"
LOG_EVERY_S = 10.0
TRANSIENT = (
    "AWS Error NETWORK_CONNECTION",
    "AWS Error SLOW_DOWN",
    "AWS Error INTERNAL_FAILURE",
    "AWS Error SERVICE_UNAVAILABLE",
    "AWS Error REQUEST_TIMEOUT",
    "AWS Error UNKNOWN (HTTP status 503)",
    r"(occurred \(|the bucket answers )(SlowDown|InternalError|ServiceUnavailable|RequestTimeout|503)",
    "endpoint URL",
    "the endpoint does not answer",
)
"""A part whose store answers so, to pyarrow or to boto3, is tried again; a file is not rejected for it."""
PART_RETRIES = 3
"""With growing pauses, after those of each request."""
_PRIVATE = {"secret_file", "crosswalk", "num_cpus"}
"""Settings of this machine, which decide nothing about the shards and are written nowhere."""
_LABELS = ("splits", "modalities", "recipes")


class Summary(BaseModel):
    """What is written to dataset.json, last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    dataset: str
    recipe: str
    licence: str
    egress: Egress
    fingerprint: str
    num_items: int
    num_images: int
    num_regions: int
    num_shards: int
    rejected_images: dict[str, int]
    """Items that became no row, by reason."""
    rejected_regions: dict[str, int]
    """Regions left out of rows that there are, by reason."""
    splits: dict[str, int]
    modalities: dict[str, int]
    recipes: dict[str, int]
    patient_keys: bool
    """Whether rows have patient and study keys, where the source names patients."""
    config: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return 0 if self.num_images else 3

    def lines(self) -> list[str]:
        """The summary as a person reads it at the end of a job."""
        text = [f"{self.num_images:,} images with {self.num_regions:,} regions in {self.num_shards:,} shards"]
        for what, reasons in (("items", self.rejected_images), ("regions", self.rejected_regions)):
            text += [f"  {count:>8,}  {what} left out: {reason}" for reason, count in sorted(reasons.items())]
        return text if self.num_images else [*text, "no image could be read: see rejected/ for the reasons"]


def run(cfg: Config) -> Summary | RegionSummary:
    """Ingests what is not ingested yet.

    Raises ValueError or StorageError for a configuration that cannot work, before any work; LeaseHeld where another
    driver is at it.
    """
    if isinstance(cfg, LidcIdriConfig) and cfg.regions_only:
        return write_region_table(cfg)
    secret = _secret(cfg)
    if cfg.crosswalk is not None:
        check_place(cfg.crosswalk, cfg.out, secret)
    summary = _ingest(cfg, secret)
    if cfg.crosswalk is not None and secret is not None:
        found = write_crosswalk(cfg.crosswalk, cfg.out, cfg.source(), secret)
        sys.stderr.write(found.line() + "\n")
    return summary


def _ingest(cfg: Config, secret: bytes | None) -> Summary:
    source = cfg.source() if cfg.segmenter is None else Prompted(inner=cfg.source(), segmenter=cfg.segmenter)
    storage.check_writable(cfg.out)
    fingerprint = _fingerprint(cfg, source, secret)
    with Lease(cfg.out, on_lost=give_way):
        done = _finished(cfg, fingerprint)
        if done is not None:
            return done
        rules = _rules(cfg, source, secret)
        num_parts = _begin(cfg, source, secret, rules.image_secret, fingerprint)
        with session(cfg.num_cpus):
            splits = deal_splits(cfg, cfg.source(), rules, num_parts) if cfg.splits is not None else None
            task = IngestPart(
                out=cfg.out, source=source, rules=rules, fingerprint=fingerprint, splits=splits,
                first_shard=cfg.first_shard,
            )  # fmt: skip
            return _publish(cfg, rules, fingerprint, _shards(task, num_parts))


def _shards(part: IngestPart, num_parts: int) -> Iterator[PartCounts]:
    """One task a part, each writing one shard; only counts come back."""
    import ray

    context = ray.data.DataContext.get_current()
    context.retried_map_errors, context.max_map_retries = list(TRANSIENT), PART_RETRIES
    started = shown = time.monotonic()
    parts = ray.data.range(num_parts, override_num_blocks=num_parts)
    images = regions = 0
    for number, row in enumerate(parts.map(part).iter_rows(), start=1):
        counts = PartCounts(**json.loads(row["counts"]))
        images, regions = images + counts.num_images, regions + counts.num_regions
        if time.monotonic() - shown > LOG_EVERY_S or number == num_parts:
            shown = time.monotonic()
            rate = images / (shown - started)
            line = f"{number:,}/{num_parts:,} shards · {images:,} images · {regions:,} regions · {rate:.1f} images/s"
            sys.stderr.write(line + "\n")
        yield counts


def _secret(cfg: Config) -> bytes | None:
    if cfg.secret_file is not None and not cfg.secret_file.is_file():
        raise ValueError(f"there is no secret file {cfg.secret_file}; write any long random text into it, once")
    text = cfg.secret_file.read_bytes() if cfg.secret_file is not None else os.environ.get(SECRET, "").encode()
    if cfg.secret_file is not None and not text.strip():
        raise ValueError(f"the secret file {cfg.secret_file} is empty; write any long random text into it, once")
    return text.strip() or None


def _fingerprint(cfg: Config, source: Source, secret: bytes | None) -> str:
    """Of everything that decides the shards; the secret only by a hash of its own."""
    if cfg.recipe != AUTO:
        get_recipe(cfg.recipe)
    settings = cfg.model_dump(mode="json", exclude={"out", *_PRIVATE})
    if cfg.labels:  # sets that were made before it could be said keep their fingerprint
        del settings["labels"]
    keyed = keyed_hash(secret, "fingerprint") if secret else None
    rows = 1  # not the schema's version: shards of two of them lie well in one dataset
    facts = [VERSION, rows, type(cfg).__name__, settings, source.fingerprint(), keyed]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finished(cfg: Config, fingerprint: str) -> Summary | None:
    """The summary of an ingest that is complete already. Raises ValueError where something else lies at `out`."""
    plan, finished = storage.join(cfg.out, PLAN), storage.join(cfg.out, DATASET)
    if not storage.exists(plan):
        if storage.list_objects(storage.join(cfg.out, "shards") + "/"):
            raise ValueError(f"{cfg.out}/shards holds files, but no {PLAN} says what they are; give another --out")
        return None
    if json.loads(storage.read_bytes(plan)).get("fingerprint") != fingerprint:
        raise ValueError(
            f"{cfg.out} holds another ingest: other settings, another source, or its manifest or secret has changed. "
            "Give another --out, or delete what is there."
        )
    return Summary.model_validate_json(storage.read_bytes(finished)) if storage.exists(finished) else None


def _begin(cfg: Config, source: Source, secret: bytes | None, salt: bytes, fingerprint: str) -> int:
    """Cuts the source into work parts, or finds them cut already, then notes the plan; returns how many parts.

    The plan comes second: a source that turns out to be wrong leaves nothing that a corrected one would collide with.
    """
    uri, plan = storage.join(cfg.out, "_work", "parts.json"), storage.join(cfg.out, PLAN)
    found = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    if found.get("fingerprint") == fingerprint:
        number = int(found["num_parts"])
    else:
        number = write_parts(cfg.out, source.items(), cfg.images_per_shard, secret, salt)
        if not number:
            raise ValueError("the source lists no image; check that its path is right")
        storage.write_bytes(uri, json.dumps({"num_parts": number, "fingerprint": fingerprint}).encode())
    if not storage.exists(plan):  # a driver that was killed here had cut the parts
        storage.write_bytes(plan, json.dumps({"fingerprint": fingerprint, "config": _shown(cfg)}, indent=2).encode())
    return number


def _rules(cfg: Config, source: Source, secret: bytes | None) -> RowRules:
    return RowRules(
        dataset=cfg.dataset or source.dataset, licence=cfg.licence or source.licence,
        egress=cfg.egress or source.egress, recipe=cfg.recipe, seed=cfg.seed, max_regions=cfg.max_regions,
        pixels_cleared=cfg.pixels_cleared, image_secret=secret or _salt(cfg.out), patient_secret=secret,
        limits=Limits(max_pixels=cfg.max_pixels), labels=cfg.labels,
    )  # fmt: skip


def _salt(out: str) -> bytes:
    """A random secret for the image keys, kept until the ingest is complete so that a resume gives the same keys."""
    uri = storage.join(out, "_work", "salt")
    if not storage.exists(uri):
        storage.write_bytes(uri, secrets.token_bytes(32))
    return storage.read_bytes(uri)


def _publish(cfg: Config, rules: RowRules, fingerprint: str, counts: Iterable[PartCounts]) -> Summary:
    """Adds up the counts as they come, writes dataset.json, then clears the work files away, the salt among them."""
    sums: Counter[str] = Counter()
    by: dict[str, Counter[str]] = {n: Counter() for n in ("rejected_images", "rejected_regions", *_LABELS)}
    for part in counts:
        sums.update(num_items=part.num_items, num_images=part.num_images, num_regions=part.num_regions, num_shards=1)
        for name, counter in by.items():
            counter.update(getattr(part, name))
    summary = Summary(
        dataset=rules.dataset, recipe=cfg.recipe, licence=rules.licence, egress=rules.egress, fingerprint=fingerprint,
        num_items=sums["num_items"], num_images=sums["num_images"], num_regions=sums["num_regions"],
        num_shards=sums["num_shards"], patient_keys=rules.patient_secret is not None, config=_shown(cfg),
        **{name: dict(sorted(counter.items())) for name, counter in by.items()},
    )  # fmt: skip
    storage.write_bytes(storage.join(cfg.out, DATASET), summary.model_dump_json(indent=2).encode())
    filesystem, work = storage.open_uri(storage.join(cfg.out, "_work"))
    filesystem.delete_dir(work)
    return summary


def _shown(cfg: Config) -> dict[str, Any]:
    return {"source": type(cfg).__name__, **cfg.model_dump(mode="json", exclude=_PRIVATE)}


if __name__ == "__main__":  # the same options as `meddam ingest`
    run_as("ingest")
