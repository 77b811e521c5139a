"""Recipes: the named rules by which a dataset's regions are chosen, prompted and rendered.

    recipe = get_recipe("vindr-cxr")
    mask_HW = region_prompt_mask(region, size, recipe.margin, recipe.prompt)

A row carries its recipe's name; `auto` is resolved at ingest to the recipe of the image's modality. What is the default
where (margins and regions from Sections 2.2, Tables 2 and 3 of the paper; it contradicts itself on the number of
regions, so both readings have a name):

| recipe          | prompt | margin | regions | window | detector | for                            |
|-----------------|--------|--------|---------|--------|----------|--------------------------------|
| generic         | box    | 0      | all     | header | none     | anything else                  |
| generic-mask    | mask   | 0      | all     | header | none     | the same, with masks           |
| chest-film      | box    | 0.10   | all     | header | none     | `auto` for CR, DX, RG          |
| ct              | box    | 0      | all     | header | none     | `auto` for CT, PT              |
| mr              | box    | 0      | all     | header | none     | `auto` for MR                  |
| photograph      | box    | 0.15   | all     | -      | none     | `auto` for XC                  |
| vindr-cxr       | box    | 0.10   | 5       | header | none     | VinDr-CXR, the paper's text    |
| vindr-cxr-all   | box    | 0.10   | all     | header | none     | VinDr-CXR, its Tables 2 and 3  |
| lidc-idri       | box    | 0      | 5       | lung   | none     | LIDC-IDRI, tight boxes         |
| lidc-idri-all   | box    | 0      | all     | lung   | none     | the same, every nodule         |
| lidc-idri-mask  | mask   | 0      | all     | lung   | none     | LIDC-IDRI, consensus masks     |
| lidc-idri-soft  | box    | 0      | all     | soft_tissue | none | LIDC-IDRI, for calcification  |
| lidc-idri-three-window | box | 0  | all     | three_window | none | LIDC-IDRI, R, G, B: lung, soft tissue, bone |
| lidc-idri-clip  | mask   | 0      | all     | lung   | none     | LIDC-IDRI, eight slices of each nodule |
| skincon         | box    | 0.15   | 5       | -      | lesions  | SkinCon                        |
| skincon-all     | box    | 0.15   | all     | -      | lesions  | the same, every region found   |
| idrid           | box    | 0.15   | 5       | -      | none     | IDRiD, fundus photographs      |
| idrid-all       | box    | 0.15   | all     | -      | none     | the same, every lesion         |
| nuclei          | box    | 0.10   | 5       | -      | none     | PanNuke, NuInsSeg              |
| nuclei-all      | box    | 0.10   | all     | -      | none     | the same, every cluster        |
| slide-tile      | box    | 0      | all     | -      | none     | tiles of whole slides          |
| coco            | box    | 0      | all     | -      | none     | COCO instances                 |
| coco-mask       | mask   | 0      | all     | -      | none     | COCO instances, with masks     |
| phantom-chest   | mask   | 0.10   | all     | header | none     | synthetic chest films          |
| phantom-ct      | mask   | 0      | all     | lung   | none     | synthetic CT slices            |
| phantom-skin    | mask   | 0.15   | all     | -      | none     | synthetic skin photographs     |

DAM's two views are stretched to its square input in every recipe (`aspect="stretch"`: what its weights were trained
with); crops given to other models keep their aspect ratio (`crop_aspect="pad"`). Both can be changed for a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meddam_core.focal import Aspect
from meddam_core.regions.masks import Prompt

Detector = Literal["lesions"]
"""What finds regions, in the caption job, for images whose dataset has none. lesions: weight-free, for photographs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a dataset's regions are chosen, prompted and rendered."""

    name: str
    prompt: Prompt = "box"
    margin: float = 0.0
    """Share of the box's width and height added on each side of a box prompt; a mask prompt doesn't use it."""
    max_regions: int | None = None
    """Regions an image, chosen at ingest; None keeps all."""
    window: str | None = None
    """Window preset, or three_window; None takes the header's, or percentiles where it has none."""
    clip: bool = False
    """Whether a region is shown as the eight frames of the joint image/video model, by a prompt with eight <image>."""
    aspect: Aspect = "stretch"
    """How DAM's full view and focal crop are brought to its square input."""
    crop_aspect: Aspect = "pad"
    """How crops for other models are brought to a square."""
    detector: Detector | None = None


PAPER_MAX_REGIONS = 5

_RECIPES = (
    Recipe(name="generic"),
    Recipe(name="generic-mask", prompt="mask"),
    Recipe(name="chest-film", margin=0.10),
    Recipe(name="ct"),
    Recipe(name="mr"),
    Recipe(name="photograph", margin=0.15),
    Recipe(name="vindr-cxr", margin=0.10, max_regions=PAPER_MAX_REGIONS),
    Recipe(name="vindr-cxr-all", margin=0.10),
    Recipe(name="lidc-idri", max_regions=PAPER_MAX_REGIONS, window="lung"),
    Recipe(name="lidc-idri-all", window="lung"),
    Recipe(name="lidc-idri-mask", prompt="mask", window="lung"),
    Recipe(name="lidc-idri-soft", window="soft_tissue"),
    Recipe(name="lidc-idri-three-window", window="three_window"),
    Recipe(name="lidc-idri-clip", prompt="mask", window="lung", clip=True),
    Recipe(name="skincon", margin=0.15, max_regions=PAPER_MAX_REGIONS, detector="lesions"),
    Recipe(name="skincon-all", margin=0.15, detector="lesions"),
    Recipe(name="idrid", margin=0.15, max_regions=PAPER_MAX_REGIONS),
    Recipe(name="idrid-all", margin=0.15),
    Recipe(name="nuclei", margin=0.10, max_regions=PAPER_MAX_REGIONS),
    Recipe(name="nuclei-all", margin=0.10),
    Recipe(name="slide-tile"),
    Recipe(name="coco"),
    Recipe(name="coco-mask", prompt="mask"),
    Recipe(name="phantom-chest", prompt="mask", margin=0.10),
    Recipe(name="phantom-ct", prompt="mask", window="lung"),
    Recipe(name="phantom-skin", prompt="mask", margin=0.15),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}

AUTO = "auto"
_BY_MODALITY = {
    "CR": "chest-film",
    "DX": "chest-film",
    "RG": "chest-film",
    "CT": "ct",
    "PT": "ct",
    "MR": "mr",
    "XC": "photograph",
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError with the names there are."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def resolve_recipe(name: str, modality: str) -> Recipe:
    """The recipe of that name, or for `auto` the one of the image's modality (generic where it has none)."""
    return get_recipe(_BY_MODALITY.get(modality, "generic") if name == AUTO else name)
