"""A curated set in several lengths, so that a model learns to answer in each: by rule, or by a language model.

    meddam shorten s3://bucket/sets/one --out s3://bucket/sets/lengths
    meddam shorten s3://bucket/sets/one --length sentence --by llm --model llama-3.1-8b \\
        --base-url http://llm:8000/v1 --retention inside --out s3://bucket/sets/lengths

Run the same command again after any failure, or with more --max-usd: finished parts are kept. Writes another curated
set, which `meddam finetune` and `meddam export` take like the first:

    OUT/captions/*.parquet     the captions of SET, and beside each its shorter forms: prompt `meddam-v1+sentence`, ...
    OUT/dropped/*.parquet      summaries that add to the caption, contradict it or lose the finding, and why
    OUT/curation.json          the lineage of SET, and who shortened; written last

Invariant: captions whose dataset's egress policy does not allow it are never sent; they stay in their own length.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import __version__, storage
from meddam_core.engines.base import Sampling
from meddam_core.engines.remote import ChatFailed
from meddam_core.judging.budget import Limits
from meddam_core.judging.egress import Endpoint, Retention
from meddam_core.judging.llm import make_client, quotable
from meddam_core.judging.summaries import MAX_WORDS, SHORTER, instruction, shorter, unfaithful
from meddam_core.prompts import Length
from qa_library.loader import load_library
from ray_jobs.curate import CAPTIONS, CURATION, DROPPED
from ray_jobs.judge_calls import Prices, RetryRules
from ray_jobs.judges import ActorPermits
from ray_jobs.lease import Lease
from ray_jobs.module_command import run_as
from ray_jobs.permits import end_permits, start_permits
from ray_jobs.remote_captioner import PermittedChat
from ray_jobs.run_directory import RunDirectory
from ray_jobs.session import session

ROWS_PER_PART = 400
"""Captions of a part: also what a kill can make one pay twice."""
_DROPPED = pa.schema(
    [("region_id", pa.int64()), ("prompt_id", pa.string()), ("text", pa.string()), ("why", pa.string())]
)
Shorten = Callable[[dict[str, Any], Length], Awaitable[tuple[str | None, str]]]
"""(text or None, why there is none) for a row and a length."""


class Config(BaseModel):
    """What `meddam shorten` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: str
    """A set of `meddam curate`, on S3 or disk."""
    out: str
    """Where the set with further lengths goes."""
    lengths: tuple[Literal["sentence", "phrase", "keyword"], ...] = ("sentence", "phrase")
    """The lengths to add."""
    by: Literal["rule", "llm"] = "rule"
    """rule: offline, in the caption's own words. llm: a language model, whose summaries are checked."""
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
    max_concurrent: int = Field(32, ge=1)
    """Calls in flight, at most."""
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
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""

    @model_validator(mode="after")
    def _model_can_be_asked(self) -> Config:
        if (self.by == "llm") != (self.model is not None and self.base_url is not None):
            raise ValueError("--by llm needs --model and --base-url, and the rule takes neither")
        if self.max_usd is not None and not (self.price_prompt or self.price_reply):
            raise ValueError("--max-usd needs --price-prompt and --price-reply; without them every call is free")
        if self.base_url is not None:
            endpoint = Endpoint(self.base_url, self.retention)
            if endpoint.retention != "inside" and not os.environ.get(self.api_key_env):
                raise ValueError(f"the environment variable {self.api_key_env} holds no key for {endpoint.host}")
        if storage.join(self.out, "x") == storage.join(self.source, "x"):
            raise ValueError("--out is the set itself; give another folder")
        return self


class Summary(BaseModel):
    """What was added."""

    out: str
    num_captions: int
    added: dict[str, int]
    """Summaries by length."""
    dropped: dict[str, int]
    """Captions without a summary, by reason."""

    @property
    def exit_code(self) -> int:
        """A set that is written is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"{self.num_captions:,} captions, and {sum(self.added.values()):,} shorter ones: {self.out}"]
        text += [f"  {n:>9,}  {name}" for name, n in self.added.items()]
        return [*text, *(f"  {n:>9,}  not: {why}" for why, n in sorted(self.dropped.items(), key=lambda i: -i[1]))]


def run(cfg: Config) -> Summary:
    """Writes the set. Raises ValueError where SET is none, or where a set of other settings lies at OUT."""
    described = RunDirectory(cfg.source).read_json(CURATION)
    if described is None:
        raise ValueError(f"{cfg.source} is no curated set; make one with `meddam curate`")
    storage.check_writable(cfg.out)
    directory = RunDirectory(cfg.out)
    with Lease(directory.uri):
        begun = {"source": cfg.source, "lengths": list(cfg.lengths), "by": cfg.by, "model": cfg.model}
        there = directory.read_json("shorten.json")
        if there is not None and there != begun:
            raise ValueError(f"{cfg.out} was begun with other settings; use those, or another --out")
        directory.write_json(begun, "shorten.json")
        if cfg.by == "rule":
            asyncio.run(_write(cfg, _rule()))
        else:
            with session(cfg.num_cpus):
                _with_model(cfg, directory)
        return _finish(cfg, directory, described, begun)


def _rule() -> Shorten:
    library = load_library()

    async def shorten(row: dict[str, Any], length: Length) -> tuple[str | None, str]:
        text = shorter(library.find(row["dataset"], row["modality"]), row["text"], length)
        return text, "the rule finds no shorter form"

    return shorten


def _with_model(cfg: Config, directory: RunDirectory) -> None:
    assert cfg.base_url is not None and cfg.model is not None
    endpoint = Endpoint(cfg.base_url, cfg.retention)
    limits = Limits(
        requests_per_min=cfg.requests_per_min, tokens_per_min=cfg.tokens_per_min, max_concurrent=cfg.max_concurrent
    )
    actor = start_permits(
        cfg.base_url, limits, run=directory.uri, max_usd=cfg.max_usd, state_uri=directory.at("budget.json"),
        timeout_s=cfg.timeout_s, patience_s=cfg.patience_s,
    )  # fmt: skip
    client = make_client(endpoint, os.environ.get(cfg.api_key_env) or "none", timeout_s=cfg.timeout_s)
    chat = PermittedChat(
        client, cfg.model, ActorPermits(actor, directory.uri), RetryRules(timeout_s=cfg.timeout_s),
        Prices(cfg.price_prompt, cfg.price_reply),
    )  # fmt: skip
    try:
        asyncio.run(_write(cfg, _asking(chat, endpoint)))
    finally:
        end_permits(actor, directory.uri)


def _asking(chat: PermittedChat, endpoint: Endpoint) -> Shorten:
    async def shorten(row: dict[str, Any], length: Length) -> tuple[str | None, str]:
        if not endpoint.may_see(row["egress"]):
            return None, "its egress policy does not allow it"
        asked = instruction(quotable(row["text"]), length)
        sampling = Sampling(max_new_tokens=4 * MAX_WORDS[length])
        try:
            reply = await chat.complete([{"role": "user", "content": [{"type": "text", "text": asked}]}], sampling)
        except ChatFailed as failed:
            if failed.stops:
                raise ValueError(f"stopped: {failed}; run the same command again") from failed
            return None, str(failed)
        return reply.text.strip().strip('"') or None, "the model gave no summary"

    return shorten


async def _write(cfg: Config, shorten: Shorten) -> None:
    """The parts that are not there yet, one after another."""
    library = load_library()
    out, prefix = storage.join(cfg.out, CAPTIONS), storage.join(cfg.source, CAPTIONS) + "/"
    done = {o.uri.rpartition("/")[2] for o in storage.list_objects(out + "/", ".parquet")}
    number = 0
    for file in sorted(o.uri for o in storage.list_objects(prefix, ".parquet")):
        fs, path = storage.open_uri(file)
        table = pq.read_table(path, filesystem=fs)
        for start in range(0, table.num_rows, ROWS_PER_PART):
            name = f"part-{number:06d}.parquet"
            number += 1
            if name in done:
                continue
            part = table.slice(start, ROWS_PER_PART)
            wanted = [(row, length) for row in part.to_pylist() for length in cfg.lengths]
            found = await asyncio.gather(*(shorten(row, length) for row, length in wanted))
            added, dropped = [], []
            for (row, length), (text, why) in zip(wanted, found, strict=True):
                base = library.find(row["dataset"], row["modality"])
                objection = why if text is None else unfaithful(base, row["text"], text, length)
                prompt = f"{row['prompt_id'].split('+')[0]}+{length}"
                if objection is None:
                    added.append({**row, "prompt_id": prompt, "text": text})
                else:
                    dropped.append({"region_id": row["region_id"], "prompt_id": prompt, "text": text, "why": objection})
            _put(storage.join(cfg.out, DROPPED, name), pa.Table.from_pylist(dropped, schema=_DROPPED))
            _put(
                storage.join(out, name), pa.concat_tables([part, pa.Table.from_pylist(added, schema=table.schema)])
            )  # last: it says that the part is done


def _put(uri: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(uri, sink.getvalue())


def _finish(cfg: Config, directory: RunDirectory, described: dict[str, Any], begun: dict[str, Any]) -> Summary:
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for folder, column, counter in ((CAPTIONS, "prompt_id", counts), (DROPPED, "why", dropped)):
        for info in storage.list_objects(directory.at(folder) + "/", ".parquet"):
            fs, path = storage.open_uri(info.uri)
            counter.update(pq.read_table(path, columns=[column], filesystem=fs)[column].to_pylist())
    added = {n: sum(c for p, c in counts.items() if p.endswith(f"+{n}")) for n in SHORTER if n in cfg.lengths}
    whole = counts.total() - sum(added.values())
    document = {**described, "version": __version__, "out": cfg.out, "shortened": begun, "num_kept": counts.total()}
    directory.write_json(document, CURATION)
    return Summary(out=cfg.out, num_captions=whole, added=added, dropped=dict(dropped))


if __name__ == "__main__":  # the same options as `meddam shorten`
    run_as("shorten")
