"""What a judging has to do: which captions, which controls, in which files, and what is done already.

Memory on the driver: 8 bytes a caption and a question while they are compared; and the regions of the controls.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.judging.controls import (
    BLANK,
    LabelledRegion,
    majority_captions,
    shuffled_captions,
    truth_captions,
)
from meddam_core.records import Label
from qa_library.loader import load_library
from ray_jobs.judge_config import RETEST, Config
from ray_jobs.judges import judge_id
from ray_jobs.judging_directory import RUN_SET, Judging
from ray_jobs.question_files import QuestionFiles
from ray_jobs.run_directory import RunDirectory

CAPTION_COLUMNS = ["region_id", "prompt_id", "sample", "text", "status", "image_id", "image_key", "patient_key",
                   "dataset", "egress"]  # fmt: skip
"""What judging reads of a caption; controls are files of the same columns."""
CONTROL_SCHEMA = pa.schema(
    [
        ("region_id", pa.int64()), ("prompt_id", pa.string()), ("sample", pa.int32()), ("text", pa.string()),
        ("status", pa.string()), ("image_id", pa.int64()), ("image_key", pa.string()), ("patient_key", pa.string()),
        ("dataset", pa.string()), ("egress", pa.string()),
    ]
)  # fmt: skip
NUM_EXAMPLES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Captions that give one verdict file."""

    of: str
    """run, or a control."""
    uri: str
    first: int
    num: int
    out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How the captions and the question table fit together; regions by a few examples."""

    num_captions: int
    num_questions: int
    """In the table."""
    num_verdicts: int
    """Captions times the questions about their regions."""
    num_rated: int = 0
    """Captions of regions that have questions."""
    num_regions: int
    """With captions and questions."""
    num_without_questions: int
    num_without_captions: int
    without_questions: list[str] = field(default_factory=list)
    without_captions: list[str] = field(default_factory=list)
    egress: dict[str, int] = field(default_factory=dict)
    """Captions by dataset and policy, as "dataset (policy)"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A judging as this driver works on it."""

    cfg: Config
    judging: Judging
    judge: str
    questions: QuestionFiles
    generation: int
    files: list[str]
    coverage: Coverage
    fingerprint: dict[str, Any]

    def slices(self, controls: bool = True) -> list[Slice]:
        """All verdict files that there will be, those of the run first; with the controls once they are written."""
        sets = [(RUN_SET, uri) for uri in self.files]
        sets += [(c, self.judging.at("controls", f"{c}.parquet")) for c in self.cfg.extra_sets if controls]
        with ThreadPoolExecutor(16) as pool:
            rows = list(pool.map(lambda s: _num_rows(s[1]), sets))
        step = self.cfg.captions_per_file
        return [
            Slice(of=of, uri=uri, first=first, num=min(step, num - first),
                  out=self.judging.verdict_file(of, uri.rpartition("/")[2], first))
            for (of, uri), num in zip(sets, rows, strict=True)
            for first in range(0, num, step)
        ]  # fmt: skip


def make_plan(cfg: Config, run: RunDirectory, questions: QuestionFiles) -> Plan:
    """Compares captions and questions. Needs no Ray.

    Raises ValueError where the run is not complete, where the table is about other regions, where no caption may be
    seen by the judge, or where the judging of that name is another one.
    """
    files = run.published()
    summary = run.read_json("summary.json")
    if files is None or summary is None:
        raise ValueError(f"{run.uri} is not a complete run: run `meddam caption` again first")
    coverage = _coverage(files, questions)
    if not coverage.num_regions:
        raise ValueError(
            f"{questions.uri} holds no question about a region of {run.uri}: the table belongs to other shards. "
            "Make one with `meddam qa build`, from the run's own shards"
        )
    _check_egress(cfg, coverage)
    generation = int(summary["generation"])
    judge = judge_id(cfg)
    fingerprint = {
        "judge": judge, "questions": questions.digest, "generation": generation,
        "captions_per_file": cfg.captions_per_file, "controls": list(cfg.extra_sets),
        "control_regions": cfg.num_control_regions, "seed": cfg.seed, "library": load_library(cfg.library).version,
    }  # fmt: skip
    folder = "ratings" if cfg.judge == "llm-score" else "judging"
    return Plan(
        cfg=cfg, judging=Judging(run, cfg.name or _name(cfg, fingerprint), folder), judge=judge, questions=questions,
        generation=generation, files=files, coverage=coverage, fingerprint=fingerprint,
    )  # fmt: skip


def write_controls(plan: Plan) -> None:
    """Puts the captions of the controls, for a sample of whole images with questions."""
    if not plan.cfg.extra_sets:
        return
    rows = _sample(plan)
    regions = [
        LabelledRegion(r["region_id"], r["dataset"], r["modality"], [Label(**label) for label in r["labels"] or []])
        for r in rows
    ]
    library = load_library(plan.cfg.library)
    own = {r["region_id"]: r["text"] or "" for r in rows}
    made = {
        "blank": lambda: dict.fromkeys(own, BLANK),
        "shuffled": lambda: shuffled_captions(own, regions, library, seed=plan.cfg.seed),
        "majority": lambda: majority_captions(regions, library),
        "truth": lambda: truth_captions(regions, library),
        RETEST: lambda: own,
    }
    for control in plan.cfg.extra_sets:
        texts = made[control]()
        table = pa.Table.from_pylist(
            [
                {**{n: r[n] for n in CONTROL_SCHEMA.names}, "text": texts[r["region_id"]],
                 **({} if control == RETEST else {"prompt_id": f"control:{control}", "sample": 0, "status": "ok"})}
                for r in rows
                if r["region_id"] in texts
            ],
            schema=CONTROL_SCHEMA,
        )  # fmt: skip
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(plan.judging.at("controls", f"{control}.parquet"), sink.getvalue())


def read_slice(job: Slice, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The captions of a slice, with `more` columns where wanted."""
    fs, path = storage.open_uri(job.uri)
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        held = [i for i, end in enumerate(ends) if end > job.first and end - sizes[i] < job.first + job.num]
        if not held:
            return []
        table = file.read_row_groups(held, columns=[*CAPTION_COLUMNS, *more])
    before = int(ends[held[0]]) - sizes[held[0]]
    rows: list[dict[str, Any]] = table.slice(job.first - before, job.num).to_pylist()
    return rows


def _sample(plan: Plan) -> list[dict[str, Any]]:
    """One caption each of about `num_control_regions` regions that have questions, whole images, by their ids."""
    total = plan.coverage.num_regions
    share = min(1.0, plan.cfg.num_control_regions / total)
    kept: dict[int, dict[str, Any]] = {}
    for uri in plan.files:
        for batch in _batches(uri, [*CAPTION_COLUMNS, "modality", "labels"]):
            images = batch.column("image_id").to_numpy()
            chosen = pa.array([_draw(int(i), plan.cfg.seed) < share for i in images])
            for row in batch.filter(chosen).to_pylist():
                kept.setdefault(row["region_id"], row)
    asked = plan.questions.of(kept)
    return [kept[r] for r in sorted(kept) if r in asked]


def _draw(image: int, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _coverage(files: Sequence[str], questions: QuestionFiles) -> Coverage:
    regions: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    egress: Counter[str] = Counter()
    for uri in files:
        for batch in _batches(uri, ["region_id", "dataset", "egress"]):
            regions.append(batch.column("region_id").to_numpy())
            pairs = zip(batch.column("dataset").to_pylist(), batch.column("egress").to_pylist(), strict=True)
            egress.update(f"{dataset} ({policy})" for dataset, policy in pairs)
    captioned = np.concatenate(regions)
    unique, copies = np.unique(captioned, return_counts=True)
    asked, num_asked = questions.counts()
    _, at, asked_at = np.intersect1d(unique, asked, assume_unique=True, return_indices=True)
    without_questions = np.setdiff1d(unique, asked, assume_unique=True)
    without_captions = np.setdiff1d(asked, unique, assume_unique=True)
    return Coverage(
        num_captions=len(captioned), num_questions=questions.num_questions,
        num_verdicts=int((copies[at] * num_asked[asked_at]).sum()), num_rated=int(copies[at].sum()),
        num_regions=len(unique) - len(without_questions), num_without_questions=len(without_questions),
        num_without_captions=len(without_captions),
        without_questions=[str(r) for r in without_questions[:NUM_EXAMPLES]],
        without_captions=[str(r) for r in without_captions[:NUM_EXAMPLES]], egress=dict(egress),
    )  # fmt: skip


def _check_egress(cfg: Config, coverage: Coverage) -> None:
    """Some captions may go to some endpoint, or nothing is begun."""
    if cfg.judge == "lexical":
        return
    policies = {name.rpartition("(")[2].rstrip(")") for name in coverage.egress}
    for endpoint in cfg.endpoints:
        if not any(endpoint.may_see(policy) for policy in policies):  # type: ignore[arg-type]
            listed = ", ".join(sorted(coverage.egress))
            raise ValueError(
                f"no caption may go to {endpoint.host}, which is declared as {endpoint.retention!r}: {listed}. Declare "
                "--retention inside or zero-retention if that is what it is, or use --judge lexical"
            )


def _name(cfg: Config, fingerprint: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]
    model = cfg.models[0].rpartition("/")[2] if cfg.judge in ("llm", "llm-score") else ""
    readable = "".join(c if c.isalnum() or c in "._" else "-" for c in model)
    return "-".join(part for part in (cfg.judge, readable, digest) if part)


def _num_rows(uri: str) -> int:
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def _batches(uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        yield from pq.ParquetFile(stream).iter_batches(8192, columns=columns)
