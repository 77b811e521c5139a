"""From judged runs to the systems of a leaderboard: which model, prompt and views, with their verdicts and controls.

    systems = read_systems(["s3://lab/runs/one", "s3://lab/runs/two"])

A system is a model with a prompt and a way of showing regions; it may span several runs, one a dataset. Its name is the
model's and the prompt's, and says more only where that is needed to tell two apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meddam_core import storage
from meddam_core.judging.leaderboard import CONTROLS, Role, System
from meddam_core.judging.scores import Judged
from meddam_core.judging.verdict_table import JudgedCaption, with_questions
from meddam_core.reports.leaderboard_report import LlmScoreRow
from qa_library.questions import Question
from ray_jobs.captions_import import IMPORTED
from ray_jobs.judging_directory import JUDGE, RUN_SET, Judging, list_judgings
from ray_jobs.question_files import open_questions
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory

BATCH_CAPTIONS = 4096
"""Verdict rows whose questions are looked up at once."""
OWN_SHUFFLED: Role = "shuffled"


@dataclass(slots=True, kw_only=True)
class JudgedRun:
    """A run and the judging of it that counts."""

    run: RunDirectory
    judging: Judging
    described: dict[str, Any]
    """Its run.json."""
    label: str | None = None
    """The user's name for its model; by default the model's own."""
    dataset: str | None = None
    """The user's name for its dataset; by default that of its rows."""

    @property
    def model(self) -> str:
        """What made the captions."""
        return str(self.described["model"])


@dataclass(slots=True)
class _Questions:
    """Question tables that were read, without their wording: runs that share one share its questions."""

    held: dict[str, dict[str, Question]] = field(default_factory=dict)

    def join(self, rows: Sequence[JudgedCaption], uri: str, digest: str, dataset: str | None) -> Iterable[Judged]:
        """Verdicts with their questions. Raises ValueError where the table has changed since."""
        known = self.held.setdefault(f"{digest}/{dataset}", {})
        missing = {r.region_id for r in rows if any(v.question_id not in known for v in r.verdicts)}
        if missing:
            table = open_questions(uri)
            if table.digest != digest:
                raise ValueError(f"{uri} is not the question table that was judged with: it has changed since")
            for questions in table.of(missing).values():
                kept = (replace(q, text="", why="", options=(), dataset=dataset or q.dataset) for q in questions)
                known |= {q.question_id: q for q in kept}
        return with_questions(rows, known)


def open_judged(
    uri: str, judging: str | None = None, label: str | None = None, dataset: str | None = None
) -> JudgedRun:
    """A run with its judging; `judging` is a name or the beginning of one, and may be left out where there is one.

    Raises ValueError where the run is not judged, not completely, or by several judges of which none is named.
    """
    run = RunDirectory(uri)
    described = run.read_json(RUN)
    if described is None:
        raise ValueError(f"{uri} is not a run directory: it has no {RUN}; give the --out of `meddam caption`")
    found = [j for j in list_judgings(run) if judging is None or j.name.startswith(judging)]
    if not found:
        named = f" under the name {judging}" if judging else ""
        raise ValueError(f"{uri} is not judged{named}; run `meddam judge {uri} --questions Q` first")
    if len(found) > 1:
        raise ValueError(
            f"{uri} was judged more than once ({', '.join(j.name for j in found)}); say which with --judging NAME"
        )
    if not found[0].complete:
        raise ValueError(
            f"the judging {found[0].name} of {uri} is not complete; run the same `meddam judge` again first"
        )
    return JudgedRun(run=run, judging=found[0], described=described, label=label, dataset=dataset)


def read_systems(runs: Sequence[JudgedRun]) -> list[System]:
    """The systems that made the captions of these runs, and the controls that were judged with them.

    Raises ValueError where a system's region was judged twice: two runs of the same model, prompt and dataset.
    """
    questions = _Questions()
    verdicts: dict[tuple[str, ...], list[Judged]] = {}
    shuffled: dict[tuple[str, ...], list[Judged]] = {}
    facts: dict[tuple[str, ...], dict[str, str]] = {}
    controls: dict[Role, dict[str, list[Judged]]] = {role: {} for role in CONTROLS}
    for run in runs:
        own = _by_prompt(run, RUN_SET, questions)
        dealt = [j for rows in _by_prompt(run, OWN_SHUFFLED, questions).values() for j in rows]
        for prompt, rows in own.items():
            key = (run.label or run.model, _views(run), prompt)
            verdicts.setdefault(key, []).extend(rows)
            if len(own) == 1:  # of a run with several prompts one caption a region was dealt out, of whichever
                shuffled.setdefault(key, []).extend(dealt)
            facts.setdefault(key, _facts(run, prompt))
        for role in CONTROLS:
            if role != OWN_SHUFFLED:
                _add_control(controls[role], _by_prompt(run, role, questions))
    names = _names(list(verdicts))
    systems = [
        System(name=names[k], judged=rows, facts=facts[k], own_shuffled=shuffled.get(k, ()))
        for k, rows in verdicts.items()
    ]
    for system in systems:
        _check_once(system)
    systems += [
        System(name=f"control:{role}", role=role, judged=[j for rows in found.values() for j in rows])
        for role, found in controls.items()
        if found
    ]
    return systems


def read_llm_scores(runs: Sequence[JudgedRun]) -> tuple[list[LlmScoreRow], str]:
    """LLM-score of each system whose runs were all rated by one model, and who rated; ([], "") where none was.

    A system's score is the mean over its runs, so datasets count equally. Runs with several prompts are left out: their
    ratings are of all prompts together.
    """
    rated: dict[str, dict[tuple[str, ...] | None, list[dict[str, Any]]]] = {}
    basis: dict[str, str] = {}
    keys = [_single_key(run) for run in runs]
    for run, key in zip(runs, keys, strict=True):
        for summary in _ratings(run):
            rated.setdefault(summary["judge"], {}).setdefault(key, []).append(summary)
            basis[summary["judge"]] = f"Rated by {summary['judge']}; {summary['basis']}."
    wanted = Counter(keys)
    complete = {j: all(len(found.get(k, ())) == n for k, n in wanted.items()) for j, found in rated.items()}
    judge = next((j for j in sorted(rated) if complete[j] and None not in wanted), None)
    if judge is None:
        return [], ""
    names = _names([k for k in wanted if k is not None])
    rows = [_llm_row(names[key], summaries) for key, summaries in rated[judge].items() if key is not None]
    return sorted(rows, key=lambda r: -(r.score or 0.0)), basis[judge]


def _single_key(run: JudgedRun) -> tuple[str, ...] | None:
    prompts = list(run.described["fingerprint"]["prompts"])
    return (run.label or run.model, _views(run), prompts[0]) if len(prompts) == 1 else None


def _ratings(run: JudgedRun) -> Iterable[dict[str, Any]]:
    """The summaries of the run's complete ratings."""
    for info in storage.list_files(run.run.at("ratings"), SUMMARY, recursive=True):
        name = info.path.split("/ratings/")[-1].split("/")[0]
        summary = run.run.read_json("ratings", name, SUMMARY)
        if summary is not None and summary["state"] == "complete" and summary.get("llm_score"):
            yield summary


def _llm_row(name: str, summaries: Sequence[dict[str, Any]]) -> LlmScoreRow:
    """Means over a system's runs, 0 to 100."""

    def mean(factor: str) -> float | None:
        values = [s["llm_score"][factor]["value"] for s in summaries if factor in s["llm_score"]]
        return 100 * sum(values) / len(values) if values and None not in values else None

    factors = {f: v for f in summaries[0]["llm_score"] if f != "score" and (v := mean(f)) is not None}
    num = sum(s["num_verdicts"] for s in summaries)
    return LlmScoreRow(
        name=name, score=mean("score"), factors=factors,
        lacking=sum(sum(s["unscored"].values()) for s in summaries) / num if num else 0.0,
    )  # fmt: skip


def _by_prompt(run: JudgedRun, of: str, questions: _Questions) -> dict[str, list[Judged]]:
    described = run.judging.read_json(JUDGE)
    assert described is not None
    uri, digest = described["questions"]["uri"], described["questions"]["digest"]
    found: dict[str, list[Judged]] = {}
    for batch in _batched(run.judging.rows(of)):
        prompts = {(r.region_id, r.caption_key): r.prompt_id for r in batch}
        for judged in questions.join(batch, uri, digest, run.dataset):
            prompt = prompts[judged.question.region_id, judged.caption]
            found.setdefault(prompt, []).append(judged)
    return found


def _batched(rows: Iterable[JudgedCaption]) -> Iterable[list[JudgedCaption]]:
    batch: list[JudgedCaption] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_CAPTIONS:
            yield batch
            batch = []
    if batch:
        yield batch


def _add_control(held: dict[str, list[Judged]], found: Mapping[str, Sequence[Judged]]) -> None:
    """A control depends on the labels alone: of runs on the same dataset the first one's will do."""
    rows = [j for some in found.values() for j in some]
    for dataset in {j.question.dataset for j in rows} - held.keys():
        held[dataset] = [j for j in rows if j.question.dataset == dataset]


def _check_once(system: System) -> None:
    seen: set[tuple[str, str, str]] = set()
    for row in system.judged:
        key = (row.question.dataset, row.question.question_id, row.caption)
        if key in seen:
            raise ValueError(
                f"{system.name} was judged twice on {row.question.dataset}: leave one of its runs out, or name their "
                "models apart with --labels"
            )
        seen.add(key)


def _views(run: JudgedRun) -> str:
    """How regions were shown, where not as the recipes say."""
    views = run.described["fingerprint"].get("views") or {}
    return ", ".join(f"{k} {v}" for k, v in views.items() if k != "size" and v is not None)


def _facts(run: JudgedRun, prompt: str) -> dict[str, str]:
    engine = run.described["fingerprint"].get("engine") or {}
    if prompt == IMPORTED:
        return {"captions": f"captions of {run.model}, imported"}
    told = {
        "model": run.model, "engine": str(engine.get("engine", "")), "prompt": prompt,
        "views": _views(run) or "by recipe",
    }  # fmt: skip
    return {name: value for name, value in told.items() if value}


def _names(keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Names that tell systems apart: the model, its prompt, and its views where the two occur with several."""
    num_views = Counter((model, prompt) for model, _, prompt in keys)
    short = Counter(_name(k, num_views[k[0], k[2]] > 1, whole=False) for k in keys)
    return {
        key: _name(key, with_views, whole=short[_name(key, with_views, whole=False)] > 1)
        for key in keys
        for with_views in [num_views[key[0], key[2]] > 1]
    }


def _name(key: tuple[str, ...], with_views: bool, whole: bool) -> str:
    """`whole` keeps the hash of a checkpoint in its name."""
    model, views, prompt = key
    parts = [model if whole else model.partition("@")[0], prompt if prompt != IMPORTED else ""]
    return ", ".join(p for p in (*parts, (views or "views by recipe") if with_views else "") if p)
