"""Recipes: the paper's margins, and one table that the code and the documentation agree on."""

from __future__ import annotations

from pathlib import Path

import pytest

from meddam_core.datasets import recipes
from meddam_core.datasets.recipes import RECIPES, get_recipe, resolve_recipe
from meddam_core.imaging.windows import PRESETS, THREE_WINDOW

ROOT = Path(__file__).parents[3]


def test_the_papers_margins_and_numbers() -> None:
    assert get_recipe("vindr-cxr").margin == 0.10 and get_recipe("vindr-cxr").max_regions == 5
    assert get_recipe("vindr-cxr-all").max_regions is None
    assert get_recipe("lidc-idri").margin == 0 and get_recipe("lidc-idri").window == "lung"
    assert get_recipe("skincon").margin == 0.15 and get_recipe("skincon").detector == "lesions"
    assert {r.aspect for r in RECIPES.values()} == {"stretch"} and {r.crop_aspect for r in RECIPES.values()} == {"pad"}


def _table(text: str) -> list[list[str]]:
    lines = text[text.index("| recipe") :].splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("| ")]
    return rows[1 : len(RECIPES) + 1]


@pytest.mark.parametrize("text", [recipes.__doc__ or "", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")])
def test_the_tables_say_what_the_code_does(text: str) -> None:
    rows = _table(text)
    assert [row[0] for row in rows] == list(RECIPES)
    for name, prompt, margin, regions, window, detector, _ in rows:
        recipe = RECIPES[name]
        assert (prompt, float(margin)) == (recipe.prompt, recipe.margin)
        assert regions == ("all" if recipe.max_regions is None else str(recipe.max_regions))
        assert window == (recipe.window or window) and window in ("header", "-", THREE_WINDOW, *PRESETS)
        assert detector == (recipe.detector or "none")


def test_auto_goes_by_modality() -> None:
    assert resolve_recipe("auto", "DX").name == "chest-film"
    assert resolve_recipe("auto", "CT").name == "ct"
    assert resolve_recipe("auto", "US").name == "generic"
    assert resolve_recipe("vindr-cxr", "CT").name == "vindr-cxr"


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="use one of generic, generic-mask"):
        get_recipe("sauce")
