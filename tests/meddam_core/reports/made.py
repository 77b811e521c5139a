"""A made-up run for the report's tests: pictures with an ellipse on a gradient, captions with every status."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from meddam_core.records import Caption, Label, Status, arrow_schema, to_row
from meddam_core.reports.run_report import GalleryEntry, RunFacts, Speed
from meddam_core.reports.tally import CaptionTally

TEXT = (
    "In the right lower zone there is a round opacity with a smooth margin, denser than the lung around it. "
    "It measures about a tenth of the width of the thorax and does not touch the pleura. No calcification is seen."
)
GROUPS = [("vindr-cxr", "DX", "CC BY-NC-SA 4.0"), ("lidc-idri", "CT", "CC BY 3.0"), ("skincon", "XC", "unknown")]
OUTCOMES = [
    (Status.OK, None, None),
    (Status.OK, None, None),
    (Status.TRUNCATED, None, None),
    (Status.FAILED, "corrupt", "The pixel data ends before the last row."),
    (Status.SKIPPED, "no_regions", "The recipe found nothing to describe."),
]


def made_captions(num: int, seed: int = 0) -> list[Caption]:
    """`num` captions over three datasets and all statuses, two regions an image."""
    rng = np.random.default_rng(seed)
    captions = []
    for i in range(num):
        status, reason, detail = OUTCOMES[int(rng.choice(5, p=[0.5, 0.38, 0.08, 0.03, 0.01]))]
        dataset, modality, licence = GROUPS[i // 2 % 3]
        x0, y0 = (int(v) for v in rng.integers(20, 140, 2))
        has_text = status in (Status.OK, Status.TRUNCATED)
        captions.append(
            Caption(
                region_id=(i // 2) << 4 | i % 2, prompt_id="meddam-v1", sample=0, text=TEXT if has_text else None,
                num_tokens=int(rng.normal(60, 12)) if has_text else 0,
                mean_logprob=float(-rng.gamma(3.0, 0.12)) if has_text else None,
                finish_reason="stop" if has_text else None, status=status, reason=reason, detail=detail,
                image_id=i // 2, image_key=f"{i // 2:016x}", patient_key=None, study_key=None, dataset=dataset,
                split="test", recipe=dataset, modality=modality, width=256, height=224, pixel_spacing_mm=None,
                box=(x0, y0, x0 + 60, y0 + 44), mask=None, source="annotation", confidence=None,
                labels=[Label(name="nodule", value="present", trust=1.0), Label(name="margin", value="smooth")],
                licence=licence, egress="deny", attempt=1, model="dam-tiny", engine="torch", kernels="torch",
            )
        )  # fmt: skip
    return captions


def made_tally(captions: list[Caption]) -> CaptionTally:
    """The tally of captions, by way of the published table's schema."""
    tally = CaptionTally()
    tally.add(pa.Table.from_pylist([to_row(c) for c in captions], schema=arrow_schema(Caption)))
    return tally


def made_entry(caption: Caption, with_mask: bool) -> GalleryEntry:
    """A gallery entry whose picture shows an ellipse in the caption's box."""
    x0, y0, x1, y1 = caption.box
    yy, xx = np.mgrid[: caption.height, : caption.width]
    inside = ((xx - (x0 + x1) / 2) / (x1 - x0) * 2) ** 2 + ((yy - (y0 + y1) / 2) / (y1 - y0) * 2) ** 2 < 1
    grey = (40 + 60 * yy / caption.height + 90 * inside).astype(np.uint8)
    full = np.repeat(grey[..., None], 3, axis=2)
    return GalleryEntry(
        caption=caption,
        full_HWC=full,
        crop_HWC=np.ascontiguousarray(full[max(0, y0 - 40) : y1 + 40, max(0, x0 - 40) : x1 + 40]),
        mask_HW=inside.astype(np.uint8) if with_mask else None,
        prompt_box=None if with_mask else (x0 - 6, y0 - 4, x1 + 6, y1 + 4),
    )


def made_facts() -> RunFacts:
    """The facts of the made-up run."""
    return RunFacts(
        title="vindr-and-friends", run="s3://lab/runs/vindr-and-friends", state="incomplete", generation=2,
        model="dam-tiny", engine="torch", kernels="torch",
        prompts={"meddam-v1": "<image>\nDescribe the marked region in detail."}, recipes=["vindr-cxr", "lidc-idri"],
        fingerprint="6a1f0c72b39de4418f0e", begun_at="2026-11-20 18:02:11 UTC", finished_at="2026-11-20 18:40:55 UTC",
        wall_s=2324.0, speed=Speed(regions_per_s=3.42, tokens_per_s=207.0, busy_share=0.953),
        num_expected=610, num_missing=10, num_duplicated=0,
        settings={"Sampling": "greedy, at most 128 new tokens", "Seed": "0"},
        versions={"meddam": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
        licences=["vindr-cxr: credentialed access; captions inherit its terms."],
    )  # fmt: skip
