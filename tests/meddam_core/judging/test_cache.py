"""The verdict cache: what is kept, what is found, and what a crash leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meddam_core import storage
from meddam_core.judging.cache import VerdictCache, key_of
from meddam_core.judging.protocol import Unscored, decided, unscored
from qa_library import Question, load_library, question_about

LIBRARY = load_library()
MARGIN = question_about(LIBRARY, "lidc_idri", "margin", expected="sharp")
SPICULES = question_about(LIBRARY, "lidc_idri", "spiculation/spiculated", polarity="negative")
CAPTION = "A sharp nodule of patient Mustermann."


def keys(*captions: str, question: Question = MARGIN, judge: str = "j") -> list[bytes]:
    return [key_of(judge, question, c) for c in captions]


def test_what_is_put_is_found_here_and_by_others(tmp_path: Path) -> None:
    cache = VerdictCache(str(tmp_path))
    (key,) = keys(CAPTION)
    assert cache.get([key], [MARGIN], "j") == [None]
    assert cache.put({key: decided(MARGIN, "sharp", "j", hedged=True)}) == 1
    for reader in (cache, VerdictCache(str(tmp_path))):
        (found,) = reader.get([key], [MARGIN], "j")
        assert found is not None
        assert (found.choice, found.outcome, found.hedged, found.cached) == ("sharp", "correct", True, True)
    assert cache.put({key: decided(MARGIN, "sharp", "j")}) == 0


def test_refusals_and_failures_are_never_kept(tmp_path: Path) -> None:
    cache = VerdictCache(str(tmp_path))
    verdicts = {k: unscored(MARGIN, r, "j") for k, r in zip(keys(*map(str, Unscored)), Unscored, strict=True)}
    assert cache.put(verdicts) == 0
    assert not list(tmp_path.rglob("*.*"))


def test_the_key_is_all_that_a_verdict_depends_on_and_no_more() -> None:
    base = key_of("j", MARGIN, CAPTION)
    other_region = replace(MARGIN, region_id=7, question_id="7/x", expected=("poorly_defined",), why="?", dataset="d")
    assert key_of("j", other_region, CAPTION) == base
    changed = [
        key_of("k", MARGIN, CAPTION),
        key_of("j", MARGIN, CAPTION + "."),
        key_of("j", replace(MARGIN, text="?"), CAPTION),
        key_of("j", replace(MARGIN, options=MARGIN.options[::-1]), CAPTION),
        key_of("j", replace(MARGIN, template_id="lidc_idri/margin@2"), CAPTION),
        key_of("j", SPICULES, CAPTION),
    ]
    assert len({base, *changed}) == 7


def test_the_outcome_follows_the_question_that_asks(tmp_path: Path) -> None:
    cache = VerdictCache(str(tmp_path))
    (key,) = keys(CAPTION)
    cache.put({key: decided(MARGIN, "sharp", "j")})
    (found,) = cache.get([key], [replace(MARGIN, expected=("poorly_defined",), question_id="9/margin")], "j")
    assert found is not None
    assert (found.outcome, found.question_id) == ("wrong", "9/margin")


def test_no_text_is_stored(tmp_path: Path) -> None:
    VerdictCache(str(tmp_path)).put({key_of("j", MARGIN, CAPTION): decided(MARGIN, "sharp", "j")})
    stored = b"".join(f.read_bytes() for f in tmp_path.rglob("*.*"))
    assert b"Mustermann" not in stored
    assert MARGIN.text.encode() not in stored


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    a, b = VerdictCache(str(tmp_path), "a"), VerdictCache(str(tmp_path), "b")
    for i in range(5):
        a.put({k: decided(MARGIN, "sharp", "j") for k in keys(f"a{i}")})
        b.put({k: decided(MARGIN, "poorly_defined", "j") for k in keys(f"b{i}", "both")})
    a.refresh()
    wanted = keys(*[f"{w}{i}" for w in "ab" for i in range(5)], "both")
    assert None not in a.get(wanted, [MARGIN] * 11, "j")
    assert len(VerdictCache(str(tmp_path))) == 11
    assert len(a) == 11


def test_nothing_that_was_written_is_touched_again(tmp_path: Path) -> None:
    cache = VerdictCache(str(tmp_path))
    seen: dict[Path, bytes] = {}
    for i in range(4):
        cache.put({k: decided(MARGIN, "sharp", "j") for k in keys(str(i))})
        files = {f: f.read_bytes() for f in tmp_path.rglob("*.*")}
        assert all(files[f] == content for f, content in seen.items())
        assert len(files) == len(seen) + 2
        seen = files


@pytest.mark.parametrize("fault", ["no manifest", "half a manifest", "half a part", "no part"])
def test_what_a_crash_left_is_passed_over_and_the_rest_is_found(tmp_path: Path, fault: str) -> None:
    cache = VerdictCache(str(tmp_path), "w")
    for i in range(3):
        cache.put({k: decided(MARGIN, "sharp", "j") for k in keys(str(i))})
    manifest, part = next(tmp_path.glob("manifests/*-000003.json")), next(tmp_path.glob("parts/*-000003.parquet"))
    if fault == "no manifest":
        manifest.unlink()
    elif fault == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:40])
    elif fault == "half a part":
        part.write_bytes(part.read_bytes()[:100])
    else:
        part.unlink()
    again = VerdictCache(str(tmp_path), "x")
    assert [v is not None for v in again.get(keys("0", "1", "2"), [MARGIN] * 3, "j")] == [True, True, False]
    assert again.num_passed_over == (fault != "no manifest")
    assert again.put({k: decided(MARGIN, "sharp", "j") for k in keys("2")}) == 1
    assert len(VerdictCache(str(tmp_path))) == 3


def test_a_writer_that_comes_back_goes_on_where_it_was(tmp_path: Path) -> None:
    """The same name after a restart must not write over what it wrote before."""
    first = VerdictCache(str(tmp_path), "w")
    first.put({k: decided(MARGIN, "sharp", "j") for k in keys("0")})
    second = VerdictCache(str(tmp_path), "w")
    second.put({k: decided(MARGIN, "sharp", "j") for k in keys("1")})
    assert len(VerdictCache(str(tmp_path))) == 2


def test_ten_thousand_verdicts_are_quick_to_find(tmp_path: Path) -> None:
    cache = VerdictCache(str(tmp_path))
    many = keys(*map(str, range(10_000)))
    cache.put(dict.fromkeys(many, decided(MARGIN, "sharp", "j")))
    again = VerdictCache(str(tmp_path))
    assert len(again) == 10_000
    assert all(v is not None for v in again.get(many, [MARGIN] * 10_000, "j"))
    assert again.get(keys("none"), [MARGIN], "j") == [None]


def test_a_writers_name_is_part_of_file_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="letters and digits"):
        VerdictCache(str(tmp_path), "../x")


def test_many_small_parts_become_few_and_nothing_is_lost(tmp_path: Path) -> None:
    cache = VerdictCache(str(tmp_path), "w")
    early = VerdictCache(str(tmp_path), "r")
    for i in range(3):
        cache.put({k: decided(MARGIN, "sharp", "j", hedged=i == 1) for k in keys(str(i))})
    early.refresh()
    for i in range(3, 70):
        cache.put({k: decided(MARGIN, "sharp", "j") for k in keys(str(i))})
    assert len(list((tmp_path / "parts").iterdir())) <= 2 + 2 * 70 % 32 + 8
    assert len(list((tmp_path / "manifests").iterdir())) <= 34
    early.refresh()
    for reader in (cache, early, VerdictCache(str(tmp_path))):
        found = reader.get(keys(*map(str, range(70))), [MARGIN] * 70, "j")
        assert [v is not None and v.hedged for v in found] == [i == 1 for i in range(70)]
        assert reader.num_passed_over == 0
        assert len(reader) == 70


def test_a_ledger_keeps_what_decides_nothing(tmp_path: Path) -> None:
    ledger = VerdictCache(str(tmp_path), keep_unscored=True)
    ledger.put({k: unscored(MARGIN, Unscored.REFUSED, "j") for k in keys(CAPTION)})
    for reader in (ledger, VerdictCache(str(tmp_path), keep_unscored=True)):
        (found,) = reader.get(keys(CAPTION), [MARGIN], "j")
        assert found is not None
        assert (found.outcome, found.reason, found.choice, found.cached) == ("unscored", Unscored.REFUSED, None, True)


@pytest.mark.s3
def test_a_bucket_serves_as_well(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meddam_core.judging.cache.MERGE_PARTS", 4)
    cache = VerdictCache(f"{s3_bucket}/verdicts", "w")
    early = VerdictCache(f"{s3_bucket}/verdicts", "r")
    for i in range(10):
        cache.put({k: decided(MARGIN, "sharp", "j") for k in keys(str(i))})
    early.refresh()
    for reader in (early, VerdictCache(f"{s3_bucket}/verdicts")):
        assert None not in reader.get(keys(*map(str, range(10))), [MARGIN] * 10, "j")
        assert (len(reader), reader.num_passed_over) == (10, 0)
    assert len(storage.list_files(f"{s3_bucket}/verdicts/parts")) == 4
