"""The dataset page: figures against plain counting, the sample against the order of rows, words against HTML."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from meddam_core.records import EncodedImage, Image, Label, Region, Rle, image_id, region_id
from meddam_core.reports.dataset_report import DatasetFacts, Rejects, card, dataset_report
from meddam_core.reports.dataset_sample import UNLABELLED, RegionSample
from meddam_core.reports.dataset_tally import MAX_VALUES, OTHER, TALLY_COLUMNS, DatasetTally
from meddam_core.shards import shard_batches, write_shard
from tests.meddam_core.reports.test_run_report import Page

STATES = ("present", "absent", "undecided")


def made(shard: int, row: int) -> Image:
    """A row whose every field depends on its place."""
    ident = image_id(shard, row)
    rng = np.random.default_rng([shard, row])
    regions = [
        Region(
            region_id=region_id(ident, i), box=(10, 10, 10 + 8 * (i + 1), 20 + 2 * i),
            mask=Rle(size=(100, 200), counts="x") if i == 1 else None, source="consensus" if i else "annotation",
            confidence=i / 3 if i else None, labels=[
                Label(name="effusion", value=STATES[int(rng.integers(3))], trust=float(rng.integers(1, 4)) / 3),
                Label(name="margin", value=("sharp", "spiculated")[int(rng.integers(2))]),
                Label(name="diameter_mm", value=f"{rng.uniform(3, 30):.2f}"),
            ],
        )
        for i in range(row % 4)
    ]  # fmt: skip
    return Image(
        image_id=ident, image_key="k", patient_key=f"P{row // 3}" if row % 5 else None, dataset="films",
        split=("train", "test")[row // 3 % 2], modality="DX", image=EncodedImage(), preview=EncodedImage(),
        width=200, height=100, pixel_spacing_mm=[0.5, 0.2] if row % 2 else None, regions=regions, licence="CC0",
        labels=[Label(name="tissue", value="<b>lung</b>")] if row % 4 == 0 else [],
        egress="open" if row % 2 else "deny",
    )  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Image]]:
    folder = tmp_path_factory.mktemp("shards")
    rows = [[made(s, r) for r in range(40)] for s in range(2)]
    uris = [str(folder / f"{s}.parquet") for s in range(2)]
    for uri, some in zip(uris, rows, strict=True):
        write_shard(uri, some)
    return uris, [i for some in rows for i in some]


def tallied(uris: list[str], batch_rows: int = 7) -> DatasetTally:
    tally = DatasetTally()
    for uri in uris:
        for batch in shard_batches(uri, TALLY_COLUMNS, batch_rows):
            tally.add(batch)
    return tally


def test_figures_are_sums_over_rows(images: tuple[list[str], list[Image]]) -> None:
    uris, rows = images
    tally = tallied(uris)
    regions = [(i, r) for i in rows for r in i.regions]
    assert (tally.num_images, tally.num_regions) == (len(rows), len(regions))
    assert tally.num_without_regions == sum(not i.regions for i in rows)
    assert tally.num_masks == sum(r.mask is not None for _, r in regions)
    assert tally.sources == Counter(r.source for _, r in regions)
    effusion = tally.labels["region"]["effusion"]
    labels = [label for _, r in regions for label in r.labels if label.name == "effusion"]
    assert effusion.values == Counter(label.value for label in labels) and effusion.is_state
    assert effusion.sum_trust == pytest.approx(sum(label.trust or 0 for label in labels))
    assert effusion.num_unanimous == sum(label.trust == 1 for label in labels)
    assert set(tally.labels["region"]["margin"].values) == {"sharp", "spiculated"}
    assert tally.labels["image"]["tissue"].total == sum(bool(i.labels) for i in rows)
    assert tally.rows["egress"] == {"open": 40, "deny": 40} and tally.rows["spacing"] == {True: 40, False: 40}
    assert tally.groups["regions", "films", "DX", "train"] == sum(i.split == "train" for i, _ in regions)
    assert tally.num_patients == len({i.patient_key for i in rows} - {None}) and tally.num_shared_patients == 0


def test_sizes_in_mm_follow_spacing_that_is_not_square(images: tuple[list[str], list[Image]]) -> None:
    uris, rows = images
    tally = tallied(uris)
    longest = [
        max((r.box[2] - r.box[0]) * i.pixel_spacing_mm[1], (r.box[3] - r.box[1]) * i.pixel_spacing_mm[0])
        for i in rows if i.pixel_spacing_mm for r in i.regions
    ]  # fmt: skip
    assert sum(tally.side_mm.values()) == len(longest)
    assert tally.side_mm == Counter(int(np.floor(4 * np.log2(mm) + 1e-9)) for mm in longest)


def test_a_patient_in_two_splits_is_found(tmp_path: Path) -> None:
    rows = [made(0, 1), made(0, 2), made(0, 4)]
    write_shard(str(tmp_path / "a.parquet"), [rows[0], rows[1]])
    assert tallied([str(tmp_path / "a.parquet")]).num_shared_patients == 0
    moved = Image(**{n: getattr(rows[0], n) for n in Image.__slots__} | {"split": "test"})
    write_shard(str(tmp_path / "b.parquet"), [moved, rows[1]])
    tally = tallied([str(tmp_path / "b.parquet")])
    assert (tally.num_patients, tally.num_shared_patients) == (1, 1)
    page = dataset_report(DatasetFacts(title="t", where="w", complete=True, num_shards=1, num_bytes=1), tally, [])
    assert "1 patient in more than one split" in page


def test_counters_are_bounded(tmp_path: Path) -> None:
    region = Region(region_id=0, box=(0, 0, 5, 5))
    labels = [Label(name="free text", value=f"words {i}") for i in range(MAX_VALUES + 50)]
    image = made(0, 4)
    long = Image(**{n: getattr(image, n) for n in Image.__slots__} | {"labels": labels, "regions": [region]})
    write_shard(str(tmp_path / "a.parquet"), [long])
    counts = tallied([str(tmp_path / "a.parquet")]).labels["image"]["free text"]
    assert len(counts.values) == MAX_VALUES + 1 and counts.values[OTHER] == 50


def test_the_sample_does_not_depend_on_how_rows_lie_in_files(images: tuple[list[str], list[Image]]) -> None:
    uris, rows = images

    def drawn(order: list[str], batch_rows: int, seed: int) -> list[tuple[int, int | None, str]]:
        sample = RegionSample(20, seed)
        for uri in order:
            for batch in shard_batches(uri, TALLY_COLUMNS, batch_rows):
                sample.add(batch)
        return [(d.image_id, d.ordinal, label) for d, label in sample.shown()]

    first = drawn(uris, 7, 0)
    assert first == drawn(uris[::-1], 4096, 0) != drawn(uris, 7, 1)
    assert len(first) == 20 == len({(i, o) for i, o, _ in first})
    by_id = {i.image_id: i for i in rows}
    assert {label for _, _, label in first} == {
        "effusion", "margin: sharp", "margin: spiculated", "tissue: <b>lung</b>",
    }  # fmt: skip
    for ident, ordinal, label in first:
        of = by_id[ident].labels if ordinal is None else by_id[ident].regions[ordinal].labels
        name, _, value = label.partition(": ")
        assert (name, value or "present") in {(known.name, known.value) for known in of}
    assert UNLABELLED not in {label for _, _, label in first}


def test_the_page_shows_what_there_is_and_escapes_it(images: tuple[list[str], list[Image]]) -> None:
    uris, rows = images
    picture = np.zeros((100, 200, 3), np.uint8)
    image = rows[2]
    cards = [
        card(image, image.regions[0], "effusion", picture, picture[:40, :40].copy(), None, (5, 5, 30, 30)),
        card(rows[0], None, "tissue: <b>lung</b>", picture, None, None, None),
    ]
    rejects = Rejects(images={"corrupt": 3}, regions={"box_outside": 1}, details={"corrupt": ["it ends <too> soon"]})
    facts = DatasetFacts(
        title="films", where="s3://lab/films", complete=True, num_shards=2, num_bytes=10_000_000, num_items=83,
        rejects=rejects, settings={"Seed": "0"},
    )  # fmt: skip
    html = dataset_report(facts, tallied(uris), cards)
    page = Page(html)
    assert "<b>lung" not in html and "<too>" not in html and "it ends <too> soon" in page.text
    for words in ("80 images", "no patient in two splits", "Of 83 items", "corrupt", "box_outside", "not known of"):
        assert words in page.text, words
    assert "http://" not in html.replace("http://www.w3.org", "") and 'src="//' not in html
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert sum(tag == "li" and "data-search" in a for tag, a in page.tags) == 2
