"""How far the judges of a run agree: every two of its judgings on the questions that both decided, and all together.

    meddam judge s3://lab/runs/one --questions Q                       # the lexical judge
    meddam judge s3://lab/runs/one --questions Q --judge llm ...       # a model
    meddam check judges s3://lab/runs/one

Options chosen are compared, not right and wrong: two judges that choose different wrong options disagree. Needs no Ray.
"""

from __future__ import annotations

import itertools

from pydantic import BaseModel, ConfigDict

from meddam_core import storage
from meddam_core.judging.statistics import agreement, krippendorff_alpha
from ray_jobs.judging_directory import JUDGE, Judging, list_judgings
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RunDirectory

Choices = dict[tuple[str, str], str | None]
"""Option by (question id, caption); None where the judge decided nothing."""


class Config(BaseModel):
    """Compare the judgings of a run: shares of equal answers, and Krippendorff's alpha."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """A run that several judges have judged with the same questions."""
    out: str | None = None
    """JSON file for the figures; by default RUN/checks/judges.json."""


class Pair(BaseModel):
    """Two judges."""

    first: str
    second: str
    num_both: int
    """Questions that both decided."""
    num_unscored: int
    """Questions that at least one did not decide."""
    same: tuple[float, float, float]
    """Share of equal answers, with Wilson's interval."""
    alpha: float | None


class Summary(BaseModel):
    """How they agree."""

    out: str
    judges: dict[str, str]
    """Judge by the name of its judging."""
    pairs: list[Pair]
    alpha: float | None
    """Of all judges together; null where nothing was disagreed about."""

    @property
    def exit_code(self) -> int:
        """A comparison that was made is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"{name}: {judge}" for name, judge in self.judges.items()]
        for p in self.pairs:
            value, low, high = (100 * v for v in p.same)
            alpha = "" if p.alpha is None else f", alpha {p.alpha:.2f}"
            text.append(f"  {p.first} and {p.second}: {value:.1f} % ({low:.1f} to {high:.1f}) of {p.num_both:,}{alpha}")
        if self.alpha is not None and len(self.judges) > 2:
            text.append(f"  all together: alpha {self.alpha:.2f}")
        return [*text, f"written to {self.out}"]


def run(cfg: Config) -> Summary:
    """Compares the judgings. Raises ValueError where there are fewer than two of the same questions."""
    directory = RunDirectory(cfg.run)
    judgings = [j for j in list_judgings(directory) if j.complete]
    described = {j.name: j.read_json(JUDGE) or {} for j in judgings}
    digests = {d["questions"]["digest"] for d in described.values()}
    if len(judgings) < 2 or len(digests) > 1:
        raise ValueError(
            f"{cfg.run} has {len(judgings)} finished judgings with {len(digests)} question tables; to compare judges "
            "it needs at least two with the same one"
        )
    choices = {j.name: _choices(j) for j in judgings}
    keys = sorted(set().union(*choices.values()))
    ratings = {name: [found.get(k) for k in keys] for name, found in choices.items()}
    alpha = krippendorff_alpha(list(ratings.values()))
    summary = Summary(
        out=cfg.out or directory.at("checks", "judges.json"), judges={n: d["judge"] for n, d in described.items()},
        pairs=[_pair(a, b, ratings[a], ratings[b]) for a, b in itertools.combinations(ratings, 2)],
        alpha=_defined(alpha),
    )  # fmt: skip
    storage.write_bytes(summary.out, summary.model_dump_json(indent=1).encode() + b"\n")
    return summary


def _choices(judging: Judging) -> Choices:
    return {(v.question_id, row.caption_key): v.choice for row in judging.rows() for v in row.verdicts}


def _pair(first: str, second: str, a: list[str | None], b: list[str | None]) -> Pair:
    found = agreement(a, b)
    same = (found.same.value, found.same.low, found.same.high)
    return Pair(
        first=first, second=second, num_both=found.num_items, num_unscored=found.num_unscored, same=same,
        alpha=_defined(found.alpha),
    )  # fmt: skip


def _defined(alpha: float) -> float | None:
    return None if alpha != alpha else round(alpha, 6)


if __name__ == "__main__":  # the same options as `meddam check judges`
    run_as("check", "judges")
