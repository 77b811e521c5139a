"""A claim audit of a run: what its captions claim, held against the known labels, without a judge or questions.

    meddam check claims s3://lab/runs/one

Writes RUN/checks/claims.json (figures) and RUN/checks/claims/*.parquet (every claim), or into --out. Reads the
published captions a file at a time; needs no Ray.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from meddam_core import storage
from meddam_core.judging.claims import FREE, VERDICTS, ClaimTally, audit
from meddam_core.records import Caption, Status, from_row
from qa_library.loader import Library, load_library
from qa_library.truth import truth_of
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RunDirectory

NUM_SHOWN = 12
CLAIM_SCHEMA = pa.schema(
    [
        ("region_id", pa.int64()), ("prompt_id", pa.string()), ("sample", pa.int32()), ("dataset", pa.string()),
        ("attribute", pa.string()), ("value", pa.string()), ("status", pa.string()), ("verdict", pa.string()),
        ("hedged", pa.bool_()), ("text", pa.string()),
    ]
)  # fmt: skip


class Config(BaseModel):
    """Cut a run's captions into claims; each is supported, contradicted or unverifiable by the known labels."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """The finished run, on S3 or disk."""
    out: str | None = None
    """Folder for claims.json and the claims; by default RUN/checks."""
    library: str | None = None
    """Folder of a lab's own question templates."""
    min_trust: float = 0.5
    """Labels that a smaller share of the readers agrees on verify nothing."""


class Summary(BaseModel):
    """What the captions claim."""

    out: str
    num_captions: int
    num_without_text: int
    """Captions that failed."""
    num_without_labels: int
    """Captions of regions without a label that the question library knows."""
    num_claims: int
    by_verdict: dict[str, int]
    precision: float | None
    """Supported among the claims that can be verified."""
    recall: float | None
    """Known facts that the captions state."""
    num_contradicted_captions: int
    by_attribute: dict[str, dict[str, int]]
    contradictions: list[tuple[str, str, str, int]]
    """(attribute, value, stated or denied, how often), most often first."""

    @property
    def exit_code(self) -> int:
        """An audit that was made is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"{self.num_claims:,} claims in {self.num_captions:,} captions"]
        text += [f"  {self.by_verdict[v]:>8,}  {v}" for v in VERDICTS]
        if self.precision is not None:
            text.append(f"of those that can be verified {100 * self.precision:.1f} % are supported")
        if self.recall is not None:
            text.append(f"of the known facts {100 * self.recall:.1f} % are stated")
        text.append(f"{self.num_contradicted_captions:,} captions hold a contradicted claim; most often:")
        text += [
            f"  {n:>8,}  {attribute}: {value} {how}" for attribute, value, how, n in self.contradictions[:NUM_SHOWN]
        ]
        left = self.num_without_text + self.num_without_labels
        return [*text, *([f"{left:,} captions without text or known labels were left out"] if left else [])]


def run(cfg: Config) -> Summary:
    """Audits every caption. Raises ValueError where the run is not complete."""
    directory = RunDirectory(cfg.run)
    files = directory.published()
    if files is None:
        raise ValueError(f"{directory.uri} is not a complete run: run `meddam caption` again first")
    library, tally = load_library(cfg.library), ClaimTally()
    out = cfg.out or directory.at("checks")
    left: Counter[str] = Counter()
    for uri in files:
        rows = _audited(uri, cfg, library, tally, left)
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=CLAIM_SCHEMA), sink, compression="zstd")
        storage.write_bytes(storage.join(out, "claims", uri.rpartition("/")[2]), sink.getvalue())
    summary = _summary(out, tally, left)
    storage.write_bytes(storage.join(out, "claims.json"), summary.model_dump_json(indent=1).encode() + b"\n")
    return summary


def _audited(uri: str, cfg: Config, library: Library, tally: ClaimTally, left: Counter[str]) -> list[dict[str, object]]:
    fs, path = storage.open_uri(uri)
    rows: list[dict[str, object]] = []
    for row in pq.read_table(path, filesystem=fs, partitioning=None).to_pylist():
        caption = from_row(Caption, row)
        template_set = library.find(caption.dataset, caption.modality)
        if caption.text is None or caption.status == Status.FAILED:
            left["text"] += 1
            continue
        truth = truth_of(template_set, caption.labels, cfg.min_trust) if template_set else None
        if template_set is None or truth is None or not truth.facts:
            left["labels"] += 1
            continue
        claims = audit(caption.text, template_set, truth)
        tally.add(claims, truth)
        identity = {n: getattr(caption, n) for n in ("region_id", "prompt_id", "sample", "dataset")}
        rows += [{**identity, **dataclasses.asdict(c)} for c in claims]
    return rows


def _summary(out: str, tally: ClaimTally, left: Counter[str]) -> Summary:
    by_attribute: dict[str, dict[str, int]] = {}
    for (attribute, verdict), count in sorted(tally.verdicts.items()):
        by_attribute.setdefault(attribute or "other", {})[verdict] = count
    return Summary(
        out=out, num_captions=tally.num_captions, num_without_text=left["text"], num_without_labels=left["labels"],
        num_claims=tally.verdicts.total(), by_verdict={v: tally.count(v) for v in VERDICTS},
        precision=tally.precision, recall=tally.recall, num_contradicted_captions=tally.num_contradicted_captions,
        by_attribute=by_attribute,
        contradictions=[(*key, n) for key, n in tally.contradictions.most_common() if key[0] != FREE],
    )  # fmt: skip


if __name__ == "__main__":  # the same options as `meddam check claims`
    run_as("check", "claims")
