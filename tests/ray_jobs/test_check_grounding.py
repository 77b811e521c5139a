"""The grounding suite, from shards to figures: a model that follows the mask, and one that never looks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meddam_core.imaging.png import decode_png
from meddam_core.judging.grounding import claims_a_finding
from meddam_core.records import Image
from meddam_core.shards import read_shard
from qa_library import load_library
from ray_jobs import captions_import, check_grounding
from ray_jobs.cli import main
from tests.ray_jobs.made_lidc_rows import make_nodule_shards, truths, write_table

NOTHING = "Aerated lung without a focal abnormality."


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grounding")
    make_nodule_shards(folder / "set", 12)
    made = check_grounding.make_variants(
        check_grounding.VariantsConfig(shards=(str(folder / "set"),), out=str(folder / "variants"), num_images=10)
    )
    assert made.num_regions == {"moved": 20, "blanked": 20, "normal": 20}
    return folder


def images(folder: Path) -> dict[int, Image]:
    return {i.image_id: i for f in (folder / "shards").glob("*.parquet") for i in read_shard(str(f))}


def described(folder: Path, variant: str, captions: dict[int, str]) -> str:
    """An imported run on a variant."""
    name = f"{variant}-{len(list(folder.glob('*.csv')))}"
    shards = folder / "set" if variant == "set" else folder / "variants" / variant
    captions_import.run(
        captions_import.Config(
            table=write_table(folder / f"{name}.csv", captions),
            shards=(str(shards),),
            out=str(folder / name),
            model="m",
        )
    )
    return str(folder / name)


def test_variants_keep_ids_and_change_one_thing(variants: Path) -> None:
    original = images(variants / "set")
    moved, blanked, normal = (images(variants / "variants" / v) for v in ("moved", "blanked", "normal"))
    assert moved.keys() == blanked.keys() == normal.keys()
    assert len(moved) == 10
    for ident, image in moved.items():
        before, after = original[ident].regions, image.regions
        assert [r.region_id for r in after] == [r.region_id for r in before]
        assert [(r.box, r.labels) for r in after] == [(r.box, r.labels) for r in reversed(before)]
        assert image.image == original[ident].image
    for ident, image in blanked.items():
        assert image.image.bytes is not None
        pixels = decode_png(image.image.bytes)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1
        assert image.regions == original[ident].regions
    for ident, image in normal.items():
        for region in image.regions:
            x0, y0, x1, y1 = region.box
            assert (x1 - x0, y1 - y0) == (20, 20)
            assert 0 <= x0 < x1 <= image.width
            assert 0 <= y0 < y1 <= image.height
            assert all(x1 <= r.box[0] or r.box[2] <= x0 or y1 <= r.box[1] or r.box[3] <= y0
                       for r in original[ident].regions)  # fmt: skip
            assert [label.value for label in region.labels] == ["normal"]


def test_a_grounded_model_and_one_that_never_looks(variants: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = images(variants / "variants/moved")
    true = {r: t for r, t in truths(images(variants / "set").values()).items() if r >> 4 in kept}
    run = described(variants, "set", true)
    grounded = {
        "moved": described(variants, "moved", truths(kept.values())),
        "blanked": described(variants, "blanked", dict.fromkeys(true, NOTHING)),
        "normal": described(variants, "normal", dict.fromkeys(true, NOTHING)),
    }
    found = check_grounding.run(check_grounding.Config(run=run, **grounded))
    assert found.follows is not None
    assert (found.follows.value, found.follows.num > 20) == (1.0, True)
    for figure in (found.claims_when_blank, found.same_when_blank, found.presumed):
        assert figure is not None
        assert (figure.value, figure.num) == (0.0, 20)
    blind = {v: described(variants, v, true) for v in grounded}
    with pytest.raises(SystemExit) as code:
        main(["check", "grounding", run, "--json", *(a for v, r in blind.items() for a in (f"--{v}", r))])
    assert code.value.code == 0
    never_looks = json.loads(capsys.readouterr().out)
    assert never_looks["follows"]["value"] == 0
    for name in ("same_when_moved", "claims_when_blank", "same_when_blank", "presumed"):
        assert never_looks[name]["value"] == 1, name
    assert json.loads((Path(run) / "checks/grounding.json").read_text())["follows"]["value"] == 0


@pytest.mark.parametrize(
    ("set_id", "caption", "claimed"),
    [
        ("phantom_chest", "A spiculated nodule.", True),
        ("phantom_chest", "Normal lung without a nodule.", False),
        ("vindr_cxr", "There is a pleural effusion.", True),
        ("vindr_cxr", "No pneumothorax, no effusion.", False),
        ("lidc_idri", "", False),
    ],
)
def test_what_counts_as_claiming_a_finding(set_id: str, caption: str, claimed: bool) -> None:
    assert claims_a_finding(caption, load_library().sets[set_id]) is claimed


def test_what_is_missing_is_said(variants: Path) -> None:
    run = described(variants, "set", truths(images(variants / "set").values()))
    with pytest.raises(ValueError, match="at least one of --moved"):
        check_grounding.run(check_grounding.Config(run=run))
    with pytest.raises(ValueError, match="not a complete run"):
        check_grounding.run(check_grounding.Config(run=run, moved=str(variants / "nowhere")))
