"""The leaderboard's page, CSV and YAML say what the figures say, and load nothing."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
import yaml

from meddam_core.judging.leaderboard import Leaderboard, System, make_leaderboard
from meddam_core.judging.published import PAPER_TABLE
from meddam_core.judging.scores import ASSUMPTIONS
from meddam_core.reports.leaderboard_report import BoardFacts, LlmScoreRow, bounds, leaderboard_report, points
from meddam_core.reports.leaderboard_tables import eval_results, leaderboard_csv
from tests.meddam_core.judging.test_leaderboard import CONTROLS, judged

HOSTILE = "<script>alert(1)</script> & co"


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    systems = [
        System(name=HOSTILE, judged=judged(0.9), facts={"engine": "mii"}, own_shuffled=judged(0.55)),
        System(name="second", judged=judged(0.3)),
        *CONTROLS,
    ]
    return make_leaderboard(systems, num=200)


@pytest.fixture(scope="module")
def html(board: Leaderboard) -> str:
    facts = BoardFacts(title="Two systems", made_at="2026-01-02", settings={"Questions": "table q"})
    return leaderboard_report(board, facts)


class _Text(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_loads_nothing_and_escapes_names(html: str) -> None:
    page = _Text(html)
    assert {t for t, _ in page.tags} & {"script", "link", "iframe", "img", "object"} == set()
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert not re.search(r"url\(|@import|http", html.split("<body>")[0].split("<style>")[1])
    assert "<script>" not in html
    assert HOSTILE in page.text


def test_every_score_stands_with_its_interval(html: str, board: Leaderboard) -> None:
    text = _Text(html).text
    for standing in (*board.models, *board.controls):
        for figures in standing.scores.values():
            for interval in (figures.average, figures.positive, figures.negative):
                assert f"{points(interval.value)} {bounds(interval)}" in text
    assert "1 1 " in text or ">1</td>" in html
    assert "different" in text


def test_the_paper_is_quoted_apart_and_assumptions_are_listed(html: str) -> None:
    text = _Text(html).text
    assert all(a in text for a in ASSUMPTIONS)
    ranked, _, quoted = html.partition("own figures</h2>")
    assert quoted
    for row in PAPER_TABLE:
        assert f"<td>{row.model}</td>" in quoted
        assert f"<td>{row.model}</td>" not in ranked
        assert f">{row.med_dlc}</td>" in quoted


def test_controls_stand_beside_every_score(html: str, board: Leaderboard) -> None:
    marks = re.findall(r'class="mark (blank|majority|truth)" style="left: ([\d.]+)%"', html)
    tracks = len(board.models) + len(board.controls)
    assert len(marks) == tracks * len(board.controls)
    assert set(marks) == {("blank", "0.0"), ("majority", "50.0"), ("truth", "100.0")}
    assert "Not judged here" not in _Text(html).text
    assert html.count('class="mark dealt"') == 1


def test_a_lone_system_without_controls_has_a_page_too() -> None:
    alone = make_leaderboard([System(name="only", judged=judged(0.4))], num=200)
    llm = [LlmScoreRow(name="only", score=71.25, factors={"fluency": 80.0}, lacking=0.1)]
    facts = BoardFacts(title="t", made_at="d", llm_scores=llm, llm_basis="Rated by text.")
    text = _Text(leaderboard_report(alone, facts)).text
    assert "Not judged here: Blank, Shuffled, Majority, Truth-made" in text
    assert "Paired comparisons" not in text
    assert "71.2" in text


def test_questions_of_one_polarity_give_dashes_and_no_winner() -> None:
    first, second = (
        System(name=name, judged=[j for j in judged(share) if j.question.polarity != "negative"])
        for name, share in (("first", 0.9), ("second", 0.2))
    )
    board = make_leaderboard([first, second], num=100)
    assert [m.rank for m in board.models] == [(1, 2), (1, 2)]
    text = _Text(leaderboard_report(board, BoardFacts(title="t", made_at="d"))).text
    assert "cannot be told apart" in text
    assert "nan" not in text.lower().split()
    assert "nan" not in leaderboard_csv(board)
    assert all("negative" not in e for e in eval_results(board, date="2026-01-02")["first.yaml"].splitlines())


def test_the_csv_has_a_row_for_each_breakdown(board: Leaderboard) -> None:
    rows = list(csv.DictReader(io.StringIO(leaderboard_csv(board))))
    whole = {(r["system"], r["variant"], r["polarity"]): r for r in rows if r["dataset"] == "all"}
    assert len(whole) == 5 * 2 * 3
    first = whole[HOSTILE, "strict", "all"]
    assert float(first["score"]) == pytest.approx(100 * board.models[0].scores["strict"].average.value, abs=0.01)
    assert (first["rank_best"], first["rank_worst"]) == ("1", "1")
    assert {r["dataset"] for r in rows} == {"all", "a", "b"}
    cells = [r for r in rows if r["attribute"] == "lidc_idri/margin" and r["system"] == "second"]
    assert {(r["variant"], r["dataset"]) for r in cells} == {(v, d) for v in ("strict", "paper") for d in "ab"}


def test_the_yaml_is_what_the_hub_reads(board: Leaderboard) -> None:
    files = eval_results(board, date="2026-01-02", benchmark="lab/bench", source_url="https://lab.example/board")
    assert sorted(files) == ["script-alert-1-script-co.yaml", "second.yaml"]
    entries = yaml.safe_load(files["second.yaml"])
    assert all(set(e["dataset"]) == {"id", "task_id"} and e["dataset"]["id"] == "lab/bench" for e in entries)
    tasks = {e["dataset"]["task_id"]: e for e in entries}
    assert len(tasks) == len(entries) == 6
    assert tasks["meddlc_strict_score"]["value"] == pytest.approx(30.0)
    assert tasks["meddlc_score"]["value"] == pytest.approx(65.0)
    assert tasks["meddlc_score"]["date"] == "2026-01-02"
    assert "judge hand" in tasks["meddlc_score"]["notes"]
