"""The best of a run's samples by a judge's pairwise choice: each pair in both orders, so that no place wins.

    meddam prefer s3://bucket/runs/one --judge llm --model llama-3.1-8b --base-url http://judge:8000/v1 \\
        --retention inside --requests-per-min 600
    meddam curate s3://bucket/runs/one --choice llm-llama-3.1-8b --out s3://bucket/sets/one

Run the same command again after any failure, or with more --max-usd. Budgets, egress and what a kill can cost are those
of `meddam judge`; verdicts are shared through the same cache.

    RUN/choices/NAME/prefer.json                  the judge, and the generation of captions; written first
    RUN/choices/NAME/files/FILE.parquet           the chosen sample of each region and prompt of a caption file
    RUN/choices/NAME/summary.json                 counts; written last

Invariants: a file of choices appears whole; the same captions, judge and order give the same choices.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from collections import Counter
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import storage
from meddam_core.judging.egress import Retention
from meddam_core.judging.pairwise import Tally, agreement_preference, best_by_pairs, both, pair_question
from qa_library.loader import load_library
from ray_jobs.fingerprint import differences
from ray_jobs.judge_calls import JudgeStopped
from ray_jobs.judge_config import Config as JudgeConfig
from ray_jobs.judges import Bench, judge_id
from ray_jobs.lease import Lease
from ray_jobs.module_command import run_as
from ray_jobs.permits import end_permits, start_permits
from ray_jobs.run_directory import SUMMARY, RunDirectory
from ray_jobs.session import session
from ray_jobs.summary import EXIT_STOPPED

PREFER, CHOICES, FILES = "prefer.json", "choices", "files"
_COLUMNS = ["region_id", "prompt_id", "sample", "text", "status", "dataset", "modality", "egress", "mean_logprob"]
_SCHEMA = pa.schema(
    [("region_id", pa.int64()), ("prompt_id", pa.string()), ("sample", pa.int32()), ("num_samples", pa.int32()),
     ("num_pairs", pa.int32()), ("num_ties", pa.int32())]
)  # fmt: skip


class Config(BaseModel):
    """What `meddam prefer` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """A published run with --num-samples above 1, on S3 or disk."""
    judge: Literal["lexical", "llm"] = "lexical"
    """lexical: offline, by agreement with the other samples. llm: a language model compares two captions."""
    model: str | None = None
    """llm: model of an OpenAI-compatible endpoint."""
    base_url: str | None = None
    """llm: the endpoint, http(s)://HOST/v1."""
    retention: Retention = "retains"
    """What you declare about the endpoint: inside (of the cluster), zero-retention, or retains."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    requests_per_min: float | None = Field(None, ge=1)
    """What the endpoint allows; all jobs of the cluster share it."""
    tokens_per_min: float | None = Field(None, ge=1)
    """What the endpoint allows, prompt and reply together."""
    max_concurrent: int = Field(64, ge=1)
    """Calls in flight, at most; also what a kill can make you pay for twice."""
    max_usd: float | None = Field(None, ge=0)
    """Stop before more is spent. Run again with more to go on."""
    price_prompt: float = Field(0.0, ge=0)
    """Dollars a million prompt tokens."""
    price_reply: float = Field(0.0, ge=0)
    """Dollars a million reply tokens."""
    timeout_s: float = Field(60.0, gt=0)
    """A call that takes longer is tried again."""
    patience_s: float = Field(600.0, gt=0)
    """Stop when the endpoint has answered nothing for so long."""
    cache: str | None = None
    """Answers that runs share, on S3 or disk; by default the run's own folder."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$")
    """Name of the folder RUN/choices/NAME; by default the judge and its model."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""

    @model_validator(mode="after")
    def _judge_can_be_made(self) -> Config:
        if (self.judge == "llm") != (self.model is not None and self.base_url is not None):
            raise ValueError("--judge llm needs --model and --base-url, and the lexical judge takes neither")
        _ = self.as_judge  # raises where `meddam judge` would refuse
        return self

    @property
    def as_judge(self) -> JudgeConfig:
        """The same judge as `meddam judge` takes it. Raises ValueError where it would refuse."""
        shared = set(JudgeConfig.model_fields) & set(Config.model_fields) - {"name"}
        values = self.model_dump(include=shared)
        if self.judge == "llm":
            values |= {"models": (self.model,), "base_urls": (self.base_url,)}
        return JudgeConfig(questions="pairwise", controls=("none",), **values)

    @property
    def folder(self) -> str:
        """Name of the choices."""
        model = "".join(c if c.isalnum() or c in "._" else "-" for c in (self.model or "").rpartition("/")[2])
        return self.name or "-".join(part for part in (self.judge, model) if part)


class Summary(BaseModel):
    """How the choices ended."""

    out: str
    judge: str
    stopped: str | None = None
    num_choices: int
    """Regions and prompts with more than one usable caption."""
    num_pairs: int
    num_ties: int
    num_flipped: int
    num_unscored: int
    calls: dict[str, float] = {}

    @property
    def exit_code(self) -> int:
        """0 when every choice is made."""
        return EXIT_STOPPED if self.stopped else 0

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"stopped: {self.stopped}; run the same command again"] if self.stopped else []
        text.append(
            f"{self.num_choices:,} choices by {self.judge}: {self.num_pairs:,} pairs, each asked in both orders"
        )
        for count, what in ((self.num_ties, "ties"), (self.num_flipped, "ties where the place decided"),
                            (self.num_unscored, "ties where the judge did not decide")):  # fmt: skip
            text.append(f"  {count:>9,}  {what}")
        return [*text, self.out]


def run(cfg: Config) -> Summary:
    """Makes the choices that are not made yet. Raises ValueError for what cannot work, before the first call."""
    directory = RunDirectory(cfg.run)
    files = directory.published()
    if files is None:
        raise ValueError(f"{cfg.run} is not published: finish it with the same `meddam caption` command")
    at = directory.at(CHOICES, cfg.folder)
    begun = {"judge": judge_id(cfg.as_judge), "generation": files[0].rpartition("/")[0] if files else ""}
    storage.check_writable(at)
    with Lease(at):
        there = directory.read_json(CHOICES, cfg.folder, PREFER)
        if there is not None and (changed := differences(there, begun)):
            raise ValueError(f"{at} holds other choices: {'; '.join(changed)}. Give another --name")
        directory.write_json(begun, CHOICES, cfg.folder, PREFER)
        with session(cfg.num_cpus):
            return _choose(cfg, directory, files, at, begun["judge"])


def _choose(cfg: Config, directory: RunDirectory, files: list[str], at: str, judge: str) -> Summary:
    import ray

    done = {o.uri.rpartition("/")[2] for o in storage.list_objects(storage.join(at, FILES) + "/", ".parquet")}
    left = [f for f in files if f.rpartition("/")[2] not in done]
    permits: dict[str, Any] = {}
    for endpoint in cfg.as_judge.endpoints:
        permits[endpoint.base_url] = start_permits(
            endpoint.base_url, cfg.as_judge.limits, run=at, max_usd=cfg.max_usd,
            state_uri=storage.join(at, "budget.json"), timeout_s=cfg.timeout_s, patience_s=cfg.patience_s,
        )  # fmt: skip
    stopped = None
    try:
        if left:
            ray.data.DataContext.get_current().checkpoint_config = None  # the names of the files say what is done
            jobs = ray.data.from_items([{"file": f} for f in left], override_num_blocks=len(left))
            chosen = jobs.map_batches(  # 1:1  a caption file -> its choices; calls wait, they take no CPU
                PreferSamples, fn_constructor_args=(cfg, permits, at), batch_size=1, batch_format="pyarrow",
                num_cpus=0.25 if permits else 1, compute=ray.data.ActorPoolStrategy(size=1),
            )  # fmt: skip
            stopped = next((row["stopped"] for row in chosen.iter_rows() if row["stopped"]), None)
    finally:
        totals = [end_permits(actor, at) for actor in permits.values()]
    summary = Summary(
        out=at, judge=judge, stopped=stopped, calls={k: v for t in totals for k, v in t.items() if _number(v)},
        **_counts(at),
    )  # fmt: skip
    if stopped is None:
        directory.write_json(summary.model_dump(), CHOICES, cfg.folder, SUMMARY)
    return summary


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _counts(at: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for info in storage.list_objects(storage.join(at, FILES) + "/", ".parquet"):
        metadata = pq.read_schema(io.BytesIO(storage.read_bytes(info.uri))).metadata or {}
        counts.update(json.loads(metadata[b"meddam.counts"]))
    names = ("num_choices", *Tally.__dataclass_fields__)
    return {name: counts[name] for name in names}


def choices_of(directory: RunDirectory, name: str, file: str) -> dict[tuple[int, str], int]:
    """The chosen sample by region and prompt, of one caption file. Raises ValueError where nothing was chosen."""
    at = directory.at(CHOICES, name)
    if directory.read_json(CHOICES, name, SUMMARY) is None:
        raise ValueError(f"{directory.uri} has no finished choices {name!r}; run `meddam prefer` to the end")
    rows = pq.read_table(
        io.BytesIO(storage.read_bytes(storage.join(at, FILES, file.rpartition("/")[2]))),
        columns=["region_id", "prompt_id", "sample"],
    ).to_pylist()
    return {(r["region_id"], r["prompt_id"]): r["sample"] for r in rows}


class PreferSamples:
    """Caption files to files of choices: an async actor whose calls wait in one loop."""

    def __init__(self, cfg: Config, permits: dict[str, Any], at: str) -> None:
        self._cfg, self._at, self._library = cfg, at, load_library()
        cache = cfg.cache or storage.join(cfg.run, "judging", "cache")
        self._bench = Bench(cfg.as_judge, permits, at, cache, storage.join(at, "ledger")) if permits else None

    async def __call__(self, batch: Any) -> dict[str, list[str]]:
        return {"stopped": [await self._file(job["file"]) for job in batch.to_pylist()]}

    async def _file(self, uri: str) -> str:
        fs, path = storage.open_uri(uri)
        table = await asyncio.to_thread(pq.read_table, path, columns=_COLUMNS, filesystem=fs)
        key = ("region_id", "prompt_id")
        groups = [list(g) for _, g in itertools.groupby(table.to_pylist(), key=lambda r: tuple(r[k] for k in key))]
        try:
            found = await asyncio.gather(*(self._group(g) for g in groups))
        except JudgeStopped as stopped:
            return str(stopped)
        rows = [row for row, _ in found]
        total = sum((t for _, t in found), Tally())
        counts = {"num_choices": sum(r["num_samples"] > 1 for r in rows), **asdict(total)}
        schema = _SCHEMA.with_metadata({b"meddam.counts": json.dumps(counts).encode()})
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
        storage.write_bytes(storage.join(self._at, FILES, uri.rpartition("/")[2]), sink.getvalue())
        return ""

    async def _group(self, samples: list[dict[str, Any]]) -> tuple[dict[str, Any], Tally]:
        """The choice of one region and prompt: of finished captions, the more confident one ahead."""
        usable = [s for s in samples if s["status"] == "ok" and s["text"]]
        usable.sort(key=lambda s: -(s["mean_logprob"] if s["mean_logprob"] is not None else -99.0))
        ordered = usable or samples
        place, tally = 0, Tally()
        if len(usable) > 1:
            place, tally = await best_by_pairs([s["text"] for s in usable], self._preference(usable))
        row = {k: ordered[place][k] for k in ("region_id", "prompt_id", "sample")}
        return {**row, "num_samples": len(usable), "num_pairs": tally.num_pairs, "num_ties": tally.num_ties}, tally

    def _preference(self, samples: list[dict[str, Any]]) -> Any:
        first = samples[0]
        if self._bench is None:
            template_set = self._library.find(first["dataset"], first["modality"])
            return agreement_preference(template_set, [s["text"] for s in samples])
        bench, question = self._bench, pair_question(first["region_id"], first["dataset"])

        async def prefer(one: str, other: str) -> str | None:
            verdicts, _ = await bench.verdicts([question], both(one, other), first["egress"])
            return verdicts[0].choice

        return prefer


if __name__ == "__main__":  # the same options as `meddam prefer`
    run_as("prefer")
