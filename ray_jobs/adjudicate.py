"""Two clinicians check a judge, blind: sheets out, answers in, corrected scores.

    meddam adjudicate sheets s3://lab/runs/one --out sheets          # sheets/reader-1.html, reader-2.html and as CSV
    meddam adjudicate score sheets --first reader-1-answers.csv --second reader-2-answers.csv

A reader opens a page in any browser, without network, and saves the answers as a CSV; or fills the column `answer` of
the CSV with the letter of an option, or "unsure". `items.json` holds what the judge said: keep it from the readers.
Sheets hold captions, which are derived from patients' pictures: they go where the captions may go.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.judging.adjudication import UNSURE, Assessment, Candidate, Item, assess, corrected, draw, order_of
from meddam_core.judging.replies import LETTERS
from meddam_core.judging.statistics import Interval
from meddam_core.judging.verdict_table import JudgedCaption
from meddam_core.reports.adjudication_sheet import adjudication_sheet
from qa_library.questions import Question, from_row
from ray_jobs.judged_systems import JudgedRun, open_judged
from ray_jobs.judging_directory import JUDGE, RUN_SET
from ray_jobs.module_command import run_as
from ray_jobs.question_files import open_questions
from ray_jobs.run_directory import SUMMARY

ITEMS = "items.json"
READERS = ("reader-1", "reader-2")


class SheetsConfig(BaseModel):
    """Draw questions of a judged run and write blind sheets for two readers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """The judged run, on S3 or disk."""
    out: str
    """Folder for the sheets, on S3 or disk."""
    judging: str | None = None
    """Name of the judging, or its beginning, where the run was judged several times."""
    num: int = Field(200, ge=4)
    """Questions a reader answers: half where the judge said right, half where it said wrong."""
    seed: int = 0
    """Chooses the questions and their order."""


class ScoreConfig(BaseModel):
    """Hold a judge against the two readers' answers, and correct its scores."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sheets: str
    """The folder of `meddam adjudicate sheets`."""
    first: str
    """The first reader's answers: a CSV with the columns item and answer."""
    second: str
    """The second reader's answers."""


class Sheets(BaseModel):
    """What went out."""

    out: str
    num_items: int
    num_judged_right: int

    @property
    def exit_code(self) -> int:
        """Sheets that were written are a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        sheets = ", ".join(f"{r}.html" for r in READERS)
        return [
            f"{self.num_items} questions, {self.num_judged_right} of them judged right, for two readers",
            f"  {storage.join(self.out, sheets)} (or the .csv of the same name); keep {ITEMS} from the readers",
        ]


class Summary(BaseModel):
    """How the judge did; shares with 95 % intervals (value, low, high)."""

    judge: str
    num_items: int
    num_reference: int
    num_disagreed: int
    num_open: int
    alpha: float | None
    same_option: tuple[float, float, float]
    sensitivity: tuple[float, float, float]
    specificity: tuple[float, float, float]
    agreement: tuple[float, float, float]
    scores: dict[str, dict[str, tuple[float, float, float]]]
    """MedDLC-score, paper's variant: apparent and corrected, by positive, negative and average."""

    @property
    def exit_code(self) -> int:
        """A comparison that was made is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        alpha = "not defined" if self.alpha is None else f"{self.alpha:.2f}"
        text = [
            f"judge {self.judge} against two readers on {self.num_reference} of {self.num_items} questions "
            f"({self.num_disagreed} where they disagree, {self.num_open} left open)",
            f"  readers chose the same option: {_shown(self.same_option)}; Krippendorff's alpha {alpha}",
            f"  judge agrees with them:        {_shown(self.agreement)}",
            f"  sensitivity:                   {_shown(self.sensitivity)}",
            f"  specificity:                   {_shown(self.specificity)}",
        ]
        for name, both in self.scores.items():
            text.append(f"  {name:<9} {_shown(both['apparent'])}  corrected {_shown(both['corrected'])}")
        return text


def write_sheets(cfg: SheetsConfig) -> Sheets:
    """Draws the questions and writes the sheets. Raises ValueError where the run is not judged."""
    run = open_judged(cfg.run, cfg.judging)
    pool = _pool(run, cfg)
    items = draw(pool.candidates(_texts(run, pool)), cfg.num, cfg.seed)
    described, summary = run.judging.read_json(JUDGE) or {}, run.judging.read_json(SUMMARY) or {}
    kept = {
        "judge": described["judge"], "run": run.run.uri, "share_right": pool.num_right / pool.num_scored,
        "scores": summary.get("scores", {}).get("paper", {}).get("run", {}), "items": [_to_json(i) for i in items],
    }  # fmt: skip
    storage.write_bytes(storage.join(cfg.out, ITEMS), json.dumps(kept, indent=1).encode() + b"\n")
    for reader in READERS:
        ordered = order_of(items, reader, cfg.seed)
        storage.write_bytes(storage.join(cfg.out, f"{reader}.csv"), _sheet_csv(ordered).encode())
        page = adjudication_sheet(ordered, reader)
        storage.write_bytes(storage.join(cfg.out, f"{reader}.html"), page.encode())
    return Sheets(out=cfg.out, num_items=len(items), num_judged_right=sum(i.judged_right for i in items))


def score(cfg: ScoreConfig) -> Summary:
    """Compares the answers with the judge. Raises ValueError for sheets that do not belong together."""
    uri = storage.join(cfg.sheets, ITEMS)
    if not storage.exists(uri):
        raise ValueError(f"{cfg.sheets} holds no {ITEMS}: give the --out of `meddam adjudicate sheets`")
    kept = json.loads(storage.read_bytes(uri))
    items = [_from_json(i) for i in kept["items"]]
    answers = [read_answers(name, items) for name in (cfg.first, cfg.second)]
    found = assess(items, answers[0], answers[1], kept["share_right"])
    scores = {
        name: _both(Interval(**kept["scores"][name]), found)
        for name in ("positive", "negative", "average")
        if kept["scores"].get(name, {}).get("value") is not None
    }
    return Summary(
        judge=kept["judge"], num_items=found.num_items, num_reference=found.num_reference,
        num_disagreed=found.num_disagreed, num_open=found.num_open,
        alpha=None if found.alpha != found.alpha else found.alpha, same_option=_plain(found.same_option),
        sensitivity=_plain(found.sensitivity), specificity=_plain(found.specificity),
        agreement=_plain(found.agreement), scores=scores,
    )  # fmt: skip


def read_answers(uri: str, items: Iterable[Item]) -> dict[str, str]:
    """A filled sheet as option ids by item id: letters become options. Raises ValueError for what is no answer."""
    known = {i.item_id: i.question.option_ids for i in items}
    reader = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig")))
    if not {"item", "answer"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{uri} needs the columns item and answer; it has {', '.join(reader.fieldnames or ())}")
    answers: dict[str, str] = {}
    for row in reader:
        item, answer = row["item"].strip(), (row["answer"] or "").strip()
        options = known.get(item, [])
        place = LETTERS.find(answer.upper()) if len(answer) == 1 else -1
        if item in answers:
            raise ValueError(f"{uri} answers the item {item} twice")
        answers[item] = options[place] if 0 <= place < len(options) else answer.lower()
    return answers


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Pool:
    """A bounded sample of the run's verdicts: of each outcome and kind of question those with the smallest numbers."""

    limit: int
    seed: int
    num_scored: int = 0
    num_right: int = 0
    kept: dict[tuple[str, str], list[tuple[int, JudgedCaption, int, Question]]] = field(default_factory=dict)

    def add(self, row: JudgedCaption, questions: Mapping[str, Question]) -> None:
        for at, verdict in enumerate(row.verdicts):
            if verdict.outcome == "unscored":
                continue
            question = questions[verdict.question_id]
            self.num_scored += 1
            self.num_right += verdict.outcome == "correct"
            named = f"{self.seed}/{verdict.question_id}/{row.caption_key}".encode()
            number = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big")
            pool = self.kept.setdefault((verdict.outcome, f"{question.template_id}/{question.polarity}"), [])
            pool.append((number, row, at, question))
            if len(pool) > 4 * self.limit:
                pool.sort(key=lambda entry: entry[0])
                del pool[self.limit :]

    def chosen(self) -> list[tuple[JudgedCaption, int, Question]]:
        found = []
        for _, pool in sorted(self.kept.items()):
            pool.sort(key=lambda entry: entry[0])
            found += [(row, at, question) for _, row, at, question in pool[: self.limit]]
        return found

    def candidates(self, texts: Mapping[tuple[int, str, int], str]) -> list[Candidate]:
        return [
            Candidate(
                question=question, caption=texts[row.region_id, row.prompt_id, row.sample], verdict=row.verdicts[at],
                caption_key=row.caption_key,
            )
            for row, at, question in self.chosen()
        ]  # fmt: skip


def _pool(run: JudgedRun, cfg: SheetsConfig) -> _Pool:
    described = run.judging.read_json(JUDGE) or {}
    table = open_questions(described["questions"]["uri"])
    if table.digest != described["questions"]["digest"]:
        raise ValueError(f"{table.uri} is not the question table that was judged with: it has changed since")
    pool = _Pool(cfg.num, cfg.seed)
    batch: list[JudgedCaption] = []
    for row in run.judging.rows(RUN_SET):
        batch.append(row)
        if len(batch) == 4096:
            _add(pool, batch, table)
            batch = []
    _add(pool, batch, table)
    return pool


def _add(pool: _Pool, batch: list[JudgedCaption], table: Any) -> None:
    questions = {q.question_id: q for some in table.of(r.region_id for r in batch).values() for q in some}
    for row in batch:
        pool.add(row, questions)


def _texts(run: JudgedRun, pool: _Pool) -> dict[tuple[int, str, int], str]:
    """The captions that the sample is about."""
    wanted = {row.region_id for row, _, _ in pool.chosen()}
    texts: dict[tuple[int, str, int], str] = {}
    for uri in run.run.published() or []:
        fs, path = storage.open_uri(uri)
        columns = ["region_id", "prompt_id", "sample", "text"]
        table = pq.read_table(path, filesystem=fs, columns=columns, partitioning=None)
        mine = table.filter(pc.is_in(table["region_id"], pc.cast(list(wanted), table["region_id"].type)))
        texts |= {(r["region_id"], r["prompt_id"], r["sample"]): r["text"] or "" for r in mine.to_pylist()}
    return texts


def _sheet_csv(items: list[Item]) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["item", "description", "question", "options", "answer"])
    for item in items:
        options = " | ".join(f"{LETTERS[i]}. {o.text}" for i, o in enumerate(item.question.options))
        writer.writerow([item.item_id, item.caption, item.question.text, f"{options} | or {UNSURE}", ""])
    return sink.getvalue()


def _to_json(item: Item) -> dict[str, Any]:
    return {**dataclasses.asdict(item), "question": dataclasses.asdict(item.question)}


def _from_json(row: dict[str, Any]) -> Item:
    return Item(**{**row, "question": from_row(row["question"])})


def _both(apparent: Interval, found: Assessment) -> dict[str, tuple[float, float, float]]:
    return {"apparent": _plain(apparent), "corrected": _plain(corrected(apparent, found))}


def _plain(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _shown(interval: tuple[float, float, float]) -> str:
    value, low, high = interval
    if value != value:
        return "not defined"
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":  # the same options as `meddam adjudicate`
    run_as("adjudicate")
