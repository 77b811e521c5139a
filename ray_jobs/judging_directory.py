"""Where `meddam judge` writes: a folder a judge and question table, below the run that was judged.

    RUN/judging/NAME/judge.json                  judge, questions, generation of captions, settings; written first
    RUN/judging/NAME/lease                       who works on it
    RUN/judging/NAME/controls/SET.parquet        captions of the controls: blank, shuffled, majority, truth
    RUN/judging/NAME/verdicts/set=SET/FILE/rows-NNNNNNNN.parquet
                                                 meddam_core.judging.verdict_table; SET is `run` or a control, FILE the
                                                 caption file's name, NNNNNNNN its first row in that file
    RUN/judging/NAME/ledger/                     replies that decide nothing, so that a resume does not pay again
    RUN/judging/NAME/budget.json                 what was spent and granted
    RUN/judging/NAME/summary.json                counts and scores; written last
    RUN/ratings/NAME/                            the same for LLM-score
    RUN/judging/cache/                           verdicts by content (meddam_core.judging.cache), or another --cache

Verdict files have names that follow from what they hold, and appear whole: writing one again changes nothing.
Without summary.json a judging is not complete.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from meddam_core import storage
from meddam_core.judging.verdict_table import JudgedCaption, from_table
from ray_jobs.run_directory import SUMMARY, RunDirectory

JUDGE = "judge.json"
RUN_SET = "run"
"""The set of verdicts on the run's own captions; all others are controls."""


@dataclass(frozen=True, slots=True)
class Judging:
    """One judging of a run. `list_judgings(run)` finds those there are."""

    run: RunDirectory
    name: str
    folder: str = "judging"
    """`ratings` for LLM-score, whose rows hold a rating as the choice."""

    def at(self, *parts: str) -> str:
        """The URI of something in the judging's folder."""
        return self.run.at(self.folder, self.name, *parts)

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """A JSON file of the judging; None where it is not there."""
        return self.run.read_json(self.folder, self.name, *parts)

    def write_json(self, value: dict[str, Any], *parts: str) -> None:
        """Puts a JSON file in one step."""
        self.run.write_json(value, self.folder, self.name, *parts)

    @property
    def complete(self) -> bool:
        """Whether its summary says so."""
        summary = self.read_json(SUMMARY)
        return summary is not None and summary["state"] == "complete"

    def verdict_file(self, of: str, caption_file: str, first_row: int) -> str:
        """Where the verdicts on the rows from `first_row` of a caption file go."""
        return self.at("verdicts", f"set={of}", caption_file.removesuffix(".parquet"), f"rows-{first_row:08d}.parquet")

    def verdict_files(self, of: str = RUN_SET) -> list[str]:
        """URIs of the verdict files of a set, sorted."""
        prefix = "s3://" if storage.is_s3(self.run.uri) else ""
        infos = storage.list_files(self.at("verdicts", f"set={of}"), ".parquet", recursive=True)
        return [prefix + i.path for i in infos]

    def rows(self, of: str = RUN_SET) -> Iterator[JudgedCaption]:
        """The verdict rows of a set, a file in memory at a time. Raises ValueError where nothing was judged."""
        for uri in self.verdict_files(of):
            yield from self.rows_of(uri)

    def rows_of(self, uri: str) -> Iterator[JudgedCaption]:
        """The rows of one verdict file. Raises ValueError where nothing was judged."""
        described = self.read_json(JUDGE)
        if described is None:
            raise ValueError(f"{self.at()} is no judging: it has no {JUDGE}; make one with `meddam judge`")
        return from_table(pq.read_table(io.BytesIO(storage.read_bytes(uri))), described["judge"])


def list_judgings(run: RunDirectory) -> list[Judging]:
    """The judgings of a run, complete or not, by name."""
    infos = storage.list_files(run.at("judging"), JUDGE, recursive=True)
    names = sorted({i.path.split("/judging/")[-1].split("/")[0] for i in infos})
    return [Judging(run, name) for name in names]
