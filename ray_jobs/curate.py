"""From published captions to training data: filters, the best of several samples, balance, and a page on the yield.

    meddam curate s3://bucket/runs/one --min-logprob -0.3 --min-agreement 0.8 --out s3://bucket/sets/one
    meddam finetune s3://bucket/lab --caption s3://bucket/sets/one --model /weights/DAM-3B --out s3://bucket/ft

Reads a caption file at a time and needs no Ray session. Writes

    OUT/captions/part-000000.parquet     the chosen captions, with where they come from: run, model, judge, measures
    OUT/dropped/part-000000.parquet      every other caption: which filter, and why
    OUT/curation.json                    counts by filter, licences, lineage; written last
    OUT/yield.html                       how many captions are left at which threshold, and how right they are

Invariants: every caption of the runs is in exactly one of the two tables; the same runs and rules give the same set.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import __version__, storage
from meddam_core.curation.best import MEASURES, best_of, with_agreement, yield_curve
from meddam_core.curation.candidate import Candidate
from meddam_core.curation.filters import Drop, Rules, filters_of, passing
from meddam_core.curation.licences import licence_of_model
from meddam_core.records import Caption, arrow_schema, from_row, to_row
from meddam_core.reports.yield_report import yield_report
from ray_jobs.module_command import run_as
from ray_jobs.prefer import choices_of
from ray_jobs.run_directory import RUN, RunDirectory

CURATION, CAPTIONS, DROPPED, PAGE = "curation.json", "captions", "dropped", "yield.html"
ROWS_PER_PART = 50_000
_LINEAGE = [("asked_with", pa.string()), ("run", pa.string()), ("weights_licence", pa.string()),
            ("judge", pa.string()), ("chosen_by", pa.string()), ("agreement", pa.float32()),
            ("verdict_share", pa.float32()), ("truth_share", pa.float32())]  # fmt: skip
_DROPPED = pa.schema(
    [("run", pa.string()), ("region_id", pa.int64()), ("prompt_id", pa.string()), ("sample", pa.int32()),
     ("filter", pa.string()), ("why", pa.string())]
)  # fmt: skip


class Config(BaseModel):
    """What `meddam curate` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: tuple[str, ...] = Field(min_length=1)
    """Published runs of `meddam caption`, on S3 or disk."""
    out: str
    """Where the set goes, on S3 or disk."""
    judging: str | None = None
    """Name of a judging of the runs (`meddam judge`) whose verdicts count."""
    min_logprob: float | None = None
    """Least mean log-probability of a caption's tokens."""
    keep_confident: float | None = Field(None, gt=0, le=1)
    """Of what the other thresholds leave, this share: the most confident, where no fixed --min-logprob would fit."""
    min_agreement: float | None = Field(None, ge=0, le=1)
    """Least likeness to the other samples of the region; needs runs with --num-samples above 1."""
    min_verdicts: float | None = Field(None, ge=0, le=1)
    """Least share of right verdicts; needs --judging."""
    min_truth: float | None = Field(None, ge=0, le=1)
    """Least share of the region's own labels that the caption tells rightly, by the lexical judge."""
    min_words: int = Field(3, ge=0)
    """Shorter captions are dropped."""
    max_words: int = Field(120, ge=1)
    """Longer captions are dropped."""
    max_hedges: int | None = Field(0, ge=0)
    """Words such as "possibly" that a caption may hold."""
    max_repetition: float = Field(0.3, ge=0, le=1)
    """Share of word triples that may be repeated."""
    best_of_samples: bool = True
    """Keep only the best of the samples of a region and prompt."""
    choice: str | None = None
    """The best is the one that a judge chose pairwise: name of the choices of the runs (`meddam prefer`)."""
    max_same_text: int | None = Field(None, ge=1)
    """Captions with the same words, at most."""
    max_per_patient: int | None = Field(None, ge=1)
    """Captions of one patient, at most; of one image where the patient is unknown."""
    balance: tuple[str, ...] = ()
    """Labels whose values are to be about equally frequent, such as finding; or what captions state, without labels."""
    balance_ratio: float = Field(3.0, ge=1)
    """How much more frequent one value may be than another."""

    as_prompt: str | None = None
    """The prompt that the chosen captions are to answer, where another one made them (kept in asked_with)."""
    hide_truth: bool = False
    """Do not look at the regions' own labels, neither for a filter nor for the page: as if nobody knew them."""

    @model_validator(mode="after")
    def _hidden_truth_is_not_used(self) -> Config:
        if self.hide_truth and self.min_truth is not None:
            raise ValueError("--min-truth asks for the labels that --hide-truth hides; leave one of them out")
        return self

    @property
    def rules(self) -> Rules:
        """The filters' rules."""
        return Rules(**{name: getattr(self, name) for name in Rules.__dataclass_fields__})


class Summary(BaseModel):
    """What became of the captions."""

    out: str
    num_captions: int
    num_kept: int
    dropped: dict[str, int]
    """Counts by filter."""
    licences: dict[str, list[str]]
    """Of images and of the weights that wrote the captions."""

    @property
    def exit_code(self) -> int:
        """Curation that ends has decided on every caption."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"{self.num_kept:,} of {self.num_captions:,} captions kept: {self.out}"]
        text += [f"  {count:>9,}  {name}" for name, count in sorted(self.dropped.items(), key=lambda i: -i[1])]
        return [*text, "licences: " + "; ".join(f"{k} {', '.join(v)}" for k, v in self.licences.items())]


@dataclass
class _Tally:
    """What the summary and the page need; counters and a bounded sample."""

    num: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    images: set[str] = field(default_factory=set)
    egress: set[str] = field(default_factory=set)
    weights: set[str] = field(default_factory=set)
    measured: dict[str, list[tuple[float, int, int]]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def saw(self, candidate: Candidate) -> None:
        self.num += 1
        self.images.add(candidate.caption.licence)
        self.egress.add(candidate.caption.egress)
        self.weights.add(licence_of_model(candidate.caption.model))
        for name, measure in MEASURES.items():
            value = measure(candidate)
            if value is not None and len(self.measured[name]) < 200_000:
                self.measured[name].append((value, candidate.truth_right or 0, candidate.truth_asked or 0))

    def dropping(self, drop: Drop) -> None:
        self.dropped[drop.filter] += 1
        shown = self.examples.setdefault(drop.filter, [])
        if len(shown) < 3:
            shown.append((drop.candidate.caption.text or "", drop.why))


def run(cfg: Config) -> Summary:
    """Curates. Raises ValueError for runs that are not published, or rules that need what the runs do not have."""
    if cfg.min_verdicts is not None and cfg.judging is None:
        raise ValueError("--min-verdicts needs --judging NAME: run `meddam judge` first")
    storage.check_writable(cfg.out)
    tally, filters = _Tally(), filters_of(_with_share(cfg))
    kept_rows, dropped_rows = _Parts(cfg.out, CAPTIONS, _kept_schema()), _Parts(cfg.out, DROPPED, _DROPPED)

    def note(drop: Drop) -> None:
        tally.dropping(drop)
        c = drop.candidate
        region_id, prompt_id, sample = c.key
        dropped_rows.add({"run": c.run, "region_id": region_id, "prompt_id": prompt_id, "sample": sample,
                          "filter": drop.filter, "why": drop.why})  # fmt: skip

    for candidate in passing(_candidates(cfg, tally, note), filters, note):
        tally.kept += 1
        kept_rows.add(_kept_row(candidate, cfg))
    kept_rows.close()
    dropped_rows.close()
    return _finish(cfg, tally)


def _with_share(cfg: Config) -> Rules:
    """The rules, with the threshold on confidence that leaves the share asked for; takes a reading of its own."""
    if cfg.keep_confident is None:
        return cfg.rules

    def ignore(drop: Drop) -> None:
        return None

    each = replace(cfg.rules, max_same_text=None, max_per_patient=None, balance=())  # filters that count come later
    left = passing(_candidates(cfg, _Tally(), ignore), filters_of(each), ignore)
    known = sorted(c.caption.mean_logprob for c in left if c.caption.mean_logprob is not None)
    if not known:
        raise ValueError("--keep-confident needs mean log-probabilities, and no caption that is left has one")
    return replace(cfg.rules, min_logprob=known[round((1 - cfg.keep_confident) * (len(known) - 1))])


def _candidates(cfg: Config, tally: _Tally, note: Any) -> Iterator[Candidate]:
    """Every caption with its measures, the lesser samples already noted as dropped."""
    for uri in cfg.runs:
        directory = RunDirectory(uri)
        files = directory.published()
        if files is None:
            raise ValueError(f"{uri} is not published: finish it with the same `meddam caption` command")
        for file in files:
            captions = [from_row(Caption, row) for row in _read(file).to_pylist()]
            if cfg.hide_truth:
                captions = [replace(c, labels=[]) for c in captions]
            chosen = choices_of(directory, cfg.choice, file) if cfg.choice is not None else None
            measured = _measured(cfg, directory.uri, captions, _verdicts(directory, cfg.judging, file))
            for _, group in itertools.groupby(measured, key=lambda c: c.key[:2]):
                samples = with_agreement(list(group))
                for sample in samples:
                    tally.saw(sample)
                usable = [s for s in samples if s.caption.status == "ok" and s.caption.text]
                best = best_of(usable or samples) if cfg.best_of_samples else None
                if chosen is not None:
                    best = next(s for s in samples if s.key[2] == chosen[s.key[:2]])
                for sample in samples:
                    if best is None or sample is best:
                        yield sample
                    elif chosen is not None:
                        note(Drop(sample, "pairwise", f"the judge of {cfg.choice} chose another sample"))
                    else:
                        note(Drop(sample, "best_of_samples", "another sample of this region and prompt is better"))


def _read(uri: str) -> pa.Table:
    fs, path = storage.open_uri(uri)
    return pq.read_table(path, filesystem=fs)


def _verdicts(directory: RunDirectory, judging: str | None, file: str) -> dict[tuple[int, str, int], tuple[int, int]]:
    """(right, asked) by caption, of one caption file's verdicts."""
    if judging is None:
        return {}
    name = file.rpartition("/")[2].removesuffix(".parquet")
    folder = directory.at("judging", judging, "verdicts", "set=run", name)
    found = storage.list_objects(folder + "/", ".parquet")
    if not found:
        raise ValueError(f"{directory.uri} has no judging {judging!r} of its captions; run `meddam judge` to the end")
    counts = {}
    for part in found:
        for row in _read(part.uri).to_pylist():
            outcomes = [v["outcome"] for v in row["verdicts"] or []]
            asked = sum(o != "unscored" for o in outcomes)
            counts[row["region_id"], row["prompt_id"], row["sample"]] = (outcomes.count("correct"), asked)
    return counts


def _measured(
    cfg: Config, run_uri: str, captions: Sequence[Caption], verdicts: dict[tuple[int, str, int], tuple[int, int]]
) -> list[Candidate]:
    """Captions with verdicts, with what the lexical judge says of them against the region's own labels, and what they
    state where balance has no labels to go by."""
    from meddam_core.judging.lexical import LexicalJudge
    from qa_library.build import Settings, questions_of_image
    from qa_library.loader import load_library

    library = load_library()
    judge = LexicalJudge(library)
    found = []
    for _, group in itertools.groupby(captions, key=lambda c: c.image_id):
        members = list(group)
        regions = {c.region_id: SimpleNamespace(region_id=c.region_id, box=c.box, labels=c.labels) for c in members}
        image = SimpleNamespace(dataset=members[0].dataset, modality=members[0].modality, recipe=members[0].recipe,
                                window=None, regions=list(regions.values()))  # fmt: skip
        questions = questions_of_image(image, library, Settings()).questions
        for caption in members:
            right, asked = verdicts.get((caption.region_id, caption.prompt_id, caption.sample), (None, None))
            template_set = library.find(image.dataset, image.modality)
            own = [q for q in questions if q.region_id == caption.region_id]
            answers = [judge.judge(q, caption.text or "").outcome for q in own] if caption.text else []
            found.append(
                Candidate(caption=caption, run=run_uri, right=right, asked=asked,
                          truth_right=answers.count("correct") if answers else None,
                          truth_asked=sum(a != "unscored" for a in answers) if answers else None,
                          stated=_stated(template_set, caption.text or "") if cfg.balance else {})
            )  # fmt: skip
    return found


def _stated(template_set: Any, text: str) -> dict[str, str]:
    """The value of each exclusive attribute that a caption states."""
    from meddam_core.judging.statements import statements

    if template_set is None:
        return {}
    kinds = {a.id for a in template_set.attributes if a.kind == "choice"}
    return {name: next(iter(v)) for name, v in statements(template_set, text).items() if name in kinds}


def _kept_schema() -> pa.Schema:
    base = arrow_schema(Caption)
    fields = [*base, *(pa.field(name, kind) for name, kind in _LINEAGE)]
    return pa.schema(fields, metadata={**(base.metadata or {}), b"meddam.schema": b"CuratedCaption"})


def _kept_row(candidate: Candidate, cfg: Config) -> dict[str, Any]:
    asked_with = candidate.caption.prompt_id
    return {
        **to_row(candidate.caption), "prompt_id": cfg.as_prompt or asked_with, "asked_with": asked_with,
        "run": candidate.run, "judge": cfg.judging, "chosen_by": cfg.choice, "agreement": candidate.agreement,
        "weights_licence": licence_of_model(candidate.caption.model), "verdict_share": candidate.verdict_share,
        "truth_share": candidate.truth_share,
    }  # fmt: skip


class _Parts:
    """A table that is written a part at a time."""

    def __init__(self, out: str, name: str, schema: pa.Schema) -> None:
        self._folder, self._schema, self._number = storage.join(out, name), schema, 0
        self._rows: list[dict[str, Any]] = []
        for old in storage.list_objects(self._folder + "/", ".parquet"):
            storage.delete(old.uri)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_PART:
            self.close()

    def close(self) -> None:
        if not self._rows and self._number:
            return
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), sink, compression="zstd")
        storage.write_bytes(storage.join(self._folder, f"part-{self._number:06d}.parquet"), sink.getvalue())
        self._rows, self._number = [], self._number + 1


def _finish(cfg: Config, tally: _Tally) -> Summary:
    summary = Summary(
        out=cfg.out, num_captions=tally.num, num_kept=tally.kept, dropped=dict(tally.dropped),
        licences={"images": sorted(tally.images), "weights": sorted(tally.weights)},
    )  # fmt: skip
    curves = {name: yield_curve(found) for name, found in tally.measured.items() if found}
    page = yield_report(summary.num_captions, summary.num_kept, dict(tally.dropped), curves, tally.examples)
    storage.write_bytes(storage.join(cfg.out, PAGE), page.encode())
    runs = []
    for uri in cfg.runs:
        begun = RunDirectory(uri).read_json(RUN) or {}
        runs.append({"uri": uri, "fingerprint": begun.get("fingerprint"), "config": begun.get("config")})
    document = {"job": "curate", "version": __version__, "config": cfg.model_dump(mode="json"), "runs": runs,
                "egress": sorted(tally.egress), **summary.model_dump()}  # fmt: skip
    RunDirectory(cfg.out).write_json(document, CURATION)
    return summary


if __name__ == "__main__":  # the same options as `meddam curate`
    run_as("curate")
