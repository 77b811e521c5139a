"""What a caption run would take, before it is begun: `meddam caption ... --dry-run`.

Counts the input exactly and measures the rest: a few images are prepared and described, on the node kind that would do
the work, and the run's time and size follow from that. Nothing is written.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from pydantic import BaseModel, ConfigDict

from ray_jobs.captioners import AnySpec
from ray_jobs.plan import Plan
from ray_jobs.progress import duration

NUM_WARM_UP = 4
"""Images described before the clock starts: compilation and caches."""
NUM_MEASURED = 16


class Estimate(BaseModel):
    """What a run would take."""

    model_config = ConfigDict(frozen=True)

    num_images: int
    num_regions: int
    """In the shards, and as many again as detectors can be expected to find in images without any."""
    num_captions: int
    num_captioners: int
    num_extractors: int
    engine: str
    kernels: str
    num_measured: int
    """Captions the rates below come from."""
    captions_per_s: float
    """One captioner's rate."""
    images_prepared_per_s: float
    """One CPU's rate of decoding and rendering."""
    seconds: float
    output_bytes: int

    @property
    def exit_code(self) -> int:
        """An estimate that could be made is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        slower = "captioners" if self._describe_s() >= self._extract_s() else "image preparation"
        return [
            f"{self.num_images:,} images, {self.num_regions:,} regions, {self.num_captions:,} captions to make",
            f"about {duration(self.seconds)} with {self.num_captioners} captioner(s) ({self.engine}, {self.kernels}) "
            f"at {self.captions_per_s:.2f} captions/s each and up to {self.num_extractors} CPU(s) at "
            f"{self.images_prepared_per_s:.1f} images/s each; the {slower} set the pace",
            f"about {self.output_bytes / 1e6:,.1f} MB of captions",
            f"measured on {self.num_measured} captions; starting Ray and loading the model come on top. "
            "Nothing was written.",
        ]

    def _describe_s(self) -> float:
        return self.num_captions / (self.captions_per_s * self.num_captioners)

    def _extract_s(self) -> float:
        return self.num_images / (self.images_prepared_per_s * self.num_extractors)


def estimate(plan: Plan, spec: AnySpec, num_extractors: int) -> Estimate:
    """Measures a few images with the run's captioner. Needs Ray. Raises ValueError where no image has a region."""
    import ray

    measure = ray.remote(_measure).options(num_cpus=0.25, num_gpus=spec.gpus_each, max_retries=0)
    found: dict[str, Any] = ray.get(measure.remote(spec, plan.rules, [s.uri for s in plan.shards]))
    num_images, num_regions = (sum(getattr(s, n) for s in plan.shards) for n in ("num_images", "num_regions"))
    num_regions += round(found["detected_per_image"] * num_images)
    num_captions = num_regions * len(plan.prompts) * spec.num_samples
    shared = {
        "num_images": num_images, "num_regions": num_regions, "num_captions": num_captions,
        "num_captioners": spec.num_captioners, "num_extractors": num_extractors, "engine": spec.engine,
        "kernels": spec.kernels, "num_measured": found["num_captions"],
        "captions_per_s": found["num_captions"] / found["describe_s"],
        "images_prepared_per_s": found["images_prepared_per_s"],
        "output_bytes": round(found["bytes_per_caption"] * num_captions),
    }  # fmt: skip
    rough = Estimate(**shared, seconds=0.0)
    return Estimate(**shared, seconds=max(rough._describe_s(), rough._extract_s()))


def _measure(spec: AnySpec, rules: Any, uris: list[str]) -> dict[str, Any]:
    from meddam_core.captioner import RegionPreparer
    from meddam_core.records import RowError
    from meddam_core.shards import read_shard

    preparer, captioner = RegionPreparer(rules), spec()
    images = (image for uri in uris for image in read_shard(uri) if image.regions or preparer.recipe(image).detector)
    prepared: list[Any] = []
    times_s: list[float] = []
    num_detected = 0
    for image in itertools.islice(images, NUM_WARM_UP + NUM_MEASURED):
        started = time.perf_counter()
        try:
            prepared.append(preparer.prepare(image))
        except RowError:
            continue
        times_s.append(time.perf_counter() - started)
        num_detected += 0 if image.regions else len(prepared[-1])
    if not prepared:
        raise ValueError("no image with a region could be prepared: there is nothing to measure")
    captioner.describe([r for some in prepared[:NUM_WARM_UP] for r in some])
    measured = [r for some in prepared[NUM_WARM_UP:] or prepared for r in some]
    started = time.perf_counter()
    captions = [c for own in captioner.describe(measured) for c in own]
    describe_s = time.perf_counter() - started
    captioner.loop.close()
    return {
        "images_prepared_per_s": 1 / statistics.median(times_s), "num_captions": len(captions),
        "detected_per_image": num_detected / len(prepared),
        "describe_s": describe_s, "bytes_per_caption": _stored_bytes(captions) / len(captions),
    }  # fmt: skip


def _stored_bytes(captions: list[Any]) -> int:
    """What the captions take in a Parquet file; the columns of their images and regions add little to it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from meddam_core.records import to_row

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([to_row(c) for c in captions]), sink, compression="zstd")
    return sink.getvalue().size
