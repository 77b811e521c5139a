"""The judge as a Ray Data actor: a slice of a caption file in, its verdict file out, and counts.

Many slices share an actor, and all of their calls wait in one loop; what is paid for, and how often, is the business of
ray_jobs.judge_calls and ray_jobs.permits.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meddam_core import storage
from meddam_core.judging.llm_score import known_facts, rating_questions
from meddam_core.judging.verdict_table import JudgedCaption, to_table
from meddam_core.records import Label
from qa_library.loader import load_library
from qa_library.questions import Question
from qa_library.truth import truth_of
from ray_jobs.judge_calls import JudgeStopped
from ray_jobs.judge_config import RETEST, Config
from ray_jobs.judge_plan import Slice, read_slice
from ray_jobs.judges import Bench
from ray_jobs.question_files import QuestionFiles

RATED_COLUMNS = ("modality", "labels")


@dataclass(frozen=True, slots=True)
class _Asked:
    row: dict[str, Any]
    questions: list[Question]


class JudgeCaptions:
    """Slices of caption files to verdict files: an async actor that many slices share."""

    def __init__(self, cfg: Config, questions: QuestionFiles, permits: dict[str, Any], judging: str) -> None:
        cache = cfg.cache or storage.join(cfg.run, "judging", "cache")
        self._questions = questions
        self._rates = cfg.judge == "llm-score"
        self._library = load_library(cfg.library)
        ledger = storage.join(judging, "ledger")
        holder = uuid.uuid4().hex if (cfg.num_judges or 1) == 1 else ""
        self._bench = Bench(cfg, permits, judging, cache, ledger, holder)
        self._second = Bench(cfg, permits, judging, cache, ledger, holder, seed=1) if cfg.retest else self._bench

    async def __call__(self, batch: Any) -> dict[str, list[Any]]:
        done = [await self._slice(Slice(**job)) for job in batch.to_pylist()]
        return {"stopped": [why for why, _ in done], "counts": [json.dumps(counts) for _, counts in done]}

    async def _slice(self, job: Slice) -> tuple[str | None, Counter[str]]:
        rows = await asyncio.to_thread(read_slice, job, RATED_COLUMNS if self._rates else ())
        questions = await asyncio.to_thread(self._questions.of, {r["region_id"] for r in rows})
        asked = [_Asked(row, self._asked(row, questions.get(row["region_id"], []))) for row in rows]
        bench = self._second if job.of == RETEST else self._bench
        found = await asyncio.gather(*(self._caption(a, bench) for a in asked), return_exceptions=True)
        judged = [j for j in found if isinstance(j, JudgedCaption)]
        for failed in found:
            if isinstance(failed, JudgeStopped):
                return str(failed), Counter()
            if isinstance(failed, BaseException):
                raise failed
        sink = await asyncio.to_thread(_encode, judged)
        await asyncio.to_thread(storage.write_bytes, job.out, sink)
        verdicts = [v for j in judged for v in j.verdicts]
        return None, Counter(
            captions=len(judged), verdicts=len(verdicts), cached=sum(v.cached for v in verdicts),
            unscored=sum(v.outcome == "unscored" for v in verdicts),
        )  # fmt: skip

    def _asked(self, row: dict[str, Any], questions: list[Question]) -> list[Question]:
        """The table's questions; for LLM-score the factors, of regions that the table asks about."""
        if not self._rates or not questions:
            return questions
        template_set = self._library.find(row["dataset"], row["modality"])
        labels = [Label(**label) for label in row["labels"] or []]
        facts = known_facts(template_set, truth_of(template_set, labels)) if template_set is not None else ""
        return rating_questions(row["region_id"], row["dataset"], facts)

    async def _caption(self, asked: _Asked, bench: Bench) -> JudgedCaption:
        row = asked.row
        text = row["text"] if row["status"] != "failed" else None
        verdicts, votes = await bench.verdicts(asked.questions, text, row["egress"])
        names = ("region_id", "prompt_id", "sample", "image_id", "dataset", "status")
        return JudgedCaption(
            **{n: row[n] for n in names}, cluster=row["patient_key"] or row["image_key"],
            num_questions=len(asked.questions), verdicts=verdicts, votes=votes,
        )  # fmt: skip


def _encode(rows: list[JudgedCaption]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(rows), sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())
