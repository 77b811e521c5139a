"""`meddam ingest SOURCE` for SkinCon, fundus photographs, pathology, and the formats that datasets commonly come in.

SOURCES["skincon"]          # the config class and its positional arguments; with those of ray_jobs.ingest_config, all
"""

from __future__ import annotations

from pydantic import Field

from meddam_core.datasets.base import Source
from meddam_core.datasets.dicom_regions import DicomRegions, Slices
from meddam_core.datasets.idrid import Idrid
from meddam_core.datasets.mask_folder import MaskFolder, Regions
from meddam_core.datasets.nifti_labels import NiftiLabels
from meddam_core.datasets.nuclei import Unit
from meddam_core.datasets.nuinsseg import NuInsSeg
from meddam_core.datasets.pannuke import PanNuke
from meddam_core.datasets.phantoms import Options
from meddam_core.datasets.phantoms.inserted import InsertedPhantoms
from meddam_core.datasets.skincon import SkinCon
from meddam_core.datasets.slides import Slides
from meddam_core.datasets.webdataset import WebDataset
from ray_jobs import ingest_config
from ray_jobs.ingest_config import Config


class SkinConConfig(Config):
    """SkinCon: skin photographs of Fitzpatrick17k (or DDI) with 48 concepts; lesions are found when captioned."""

    annotations: str
    """The concept table (annotations_fitzpatrick17k.csv), on S3 or disk."""
    images: str
    """Folder of the photographs."""
    fitzpatrick: str | None = None
    """Fitzpatrick17k's own table (fitzpatrick17k.csv), for the skin type and its quality control."""
    drop_wrongly_labelled: bool = False
    """Leave out what Fitzpatrick17k's quality control found wrongly labelled."""
    split: str = "all"
    """The split that all these photographs belong to."""
    recipe: str = "skincon"
    """Rules of margin, prompt and number of regions (docs/recipes.md)."""

    def source(self) -> Source:
        return SkinCon(
            annotations=self.annotations, images=self.images, fitzpatrick=self.fitzpatrick,
            drop_wrongly_labelled=self.drop_wrongly_labelled, split=self.split,
        )  # fmt: skip


class IdridConfig(Config):
    """IDRiD: fundus photographs with a mask for each kind of lesion; other datasets named alike work too."""

    path: str
    """The folder that holds photographs and masks, on S3 or disk."""
    disc: bool = True
    """The optic disc is a region too."""
    graded: bool = False
    """Photographs that have a grade but no masks become rows, without regions."""
    min_area_px: int = Field(40, ge=1)
    """Smaller parts of a mask are no region."""
    join_px: int = Field(12, ge=0)
    """Parts of a mask nearer than this are one region."""

    def source(self) -> Source:
        return Idrid(
            path=self.path, disc=self.disc, graded=self.graded, min_area_px=self.min_area_px, join_px=self.join_px
        )


class _NucleiConfig(Config):
    """What sources of nuclei share."""

    path: str
    """The dataset's folder, on S3 or disk."""
    unit: Unit = "clusters"
    """clusters: nuclei of one type that lie together; patch: the picture as a whole."""
    min_nuclei: int = Field(3, ge=1)
    """Nuclei that a cluster has at least."""


class PanNukeConfig(_NucleiConfig):
    """PanNuke: patches of 19 tissues with nuclei of five types, as folds of .npy arrays."""

    gap_px: int = Field(16, ge=0)
    """Nuclei nearer than this are of one cluster."""

    def source(self) -> Source:
        return PanNuke(path=self.path, unit=self.unit, min_nuclei=self.min_nuclei, gap_px=self.gap_px)


class NuInsSegConfig(_NucleiConfig):
    """NuInsSeg: H&E-stained organs with label images of nuclei; any dataset in its layout works."""

    gap_px: int = Field(24, ge=0)
    """Nuclei nearer than this are of one cluster."""
    images: str = "tissue images"
    """Name of the folder of pictures within each organ's."""
    masks: str = "label masks"
    """Name of the folder of label images within each organ's."""

    def source(self) -> Source:
        return NuInsSeg(
            path=self.path, unit=self.unit, min_nuclei=self.min_nuclei, gap_px=self.gap_px, images=self.images,
            masks=self.masks,
        )  # fmt: skip


class SlidesConfig(Config):
    """Whole-slide pictures, cut into tiles of tissue through OpenSlide (the extra `wsi`)."""

    path: str
    """Folder of the slides, on S3 or disk."""
    tile_px: int = Field(512, ge=32, le=4096)
    """Side of a region, pixels."""
    context: float = Field(0.5, ge=0, le=4)
    """What is shown around a region on each side, as a share of its side."""
    mpp: float = Field(0.5, gt=0)
    """Micrometres a pixel: 0.5 is 20x, 0.25 is 40x."""
    min_tissue: float = Field(0.5, gt=0, le=1)
    """Share of a tile that is tissue, not glass."""
    max_tiles: int | None = Field(None, ge=1)
    """Tiles a slide, evenly chosen; by default all."""

    def source(self) -> Source:
        return Slides(
            path=self.path, tile_px=self.tile_px, context=self.context, mpp=self.mpp, min_tissue=self.min_tissue,
            max_tiles=self.max_tiles,
        )  # fmt: skip


class DicomSegConfig(Config):
    """DICOM segmentation objects (SEG) and the images they refer to."""

    path: str
    """Folder of the SEG files, on S3 or disk."""
    images: str
    """Folder of the images."""
    slices: Slices = "largest"
    """largest: of each segment the image on which it is largest; all: every image."""

    def source(self) -> Source:
        return DicomRegions(path=self.path, images=self.images, kind="SEG", slices=self.slices)


class RtStructConfig(Config):
    """DICOM structure sets (RTSTRUCT) and the images they are drawn on."""

    path: str
    """Folder of the RTSTRUCT files, on S3 or disk."""
    images: str
    """Folder of the images."""
    slices: Slices = "largest"
    """largest: of each structure the image on which it is largest; all: every image."""

    def source(self) -> Source:
        return DicomRegions(path=self.path, images=self.images, kind="RTSTRUCT", slices=self.slices)


class NiftiLabelsConfig(Config):
    """NIfTI volumes with label maps of the same names (nnU-Net, Medical Segmentation Decathlon)."""

    path: str
    """Folder of the label maps, on S3 or disk."""
    images: str
    """Folder of the volumes."""
    names: str | None = None
    """JSON file with the labels' names, such as dataset.json."""
    slices: Slices = "largest"
    """largest: of each label the slice on which it is largest; all: every slice."""
    modality: str = "OT"
    """DICOM code of the volumes' modality (CT, MR): NIfTI doesn't say it."""
    min_area_px: int = Field(16, ge=1)
    """A label covers at least this much of a slice."""
    split: str = "all"
    """The split that all these slices belong to."""

    def source(self) -> Source:
        return NiftiLabels(
            path=self.path, images=self.images, names=self.names, slices=self.slices, modality=self.modality,
            min_area_px=self.min_area_px, split=self.split,
        )  # fmt: skip


class MasksConfig(Config):
    """A folder of pictures and a folder of masks named after them."""

    path: str
    """Folder of the masks, on S3 or disk."""
    images: str
    """Folder of the pictures; may be the same."""
    regions: Regions = "whole"
    """whole: a mask is a region; parts: each connected part is; values: each value of a label image is."""
    label: str | None = None
    """What masks show whose names don't say it."""
    names: str = ""
    """Names of a label image's values: "1=liver;2=spleen"."""
    min_area_px: int = Field(16, ge=1)
    """Smaller parts or values are no region."""
    modality: str | None = None
    """DICOM code of the pictures' modality; by default their own, XC for colour."""
    split: str = "all"
    """The split that all these pictures belong to."""
    recipe: str = "generic-mask"
    """Rules of margin, prompt and number of regions (docs/recipes.md)."""

    def source(self) -> Source:
        return MaskFolder(
            path=self.path, images=self.images, regions=self.regions, label=self.label, names=self.names,
            min_area_px=self.min_area_px, modality=self.modality, split=self.split,
        )  # fmt: skip


class WebDatasetConfig(Config):
    """WebDataset tars: pictures with their regions as JSON or mask files."""

    path: str
    """Folder of the tars, or one of them, on S3 or disk."""
    split: str | None = None
    """The split that all these pictures belong to; by default what their JSON says."""

    def source(self) -> Source:
        return WebDataset(path=self.path, split=self.split)


class PhantomsInCtConfig(Config):
    """Synthetic lesions, whose every fact is known, put into real CT slices that you point to."""

    path: str
    """Folder of CT slices in DICOM, or a pattern of their names ("/data/*/large/*.dcm"), on S3 or disk."""
    variants: int = Field(1, ge=1)
    """Pictures made of each slice."""
    images_per_shard: int = Field(32, ge=1, le=1 << 20)
    """Pictures a shard; small, so that painting them is shared out."""
    phantom_seed: int = Field(0, ge=0)
    """Another seed gives other lesions."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of patients held out, by a hash of the PatientID: split test, the others train."""
    lesion_free: bool = False
    """The slices show no lesion of their own: then normal tissue, numbers and neighbours are described too."""
    max_lesions: int = Field(3, ge=1, le=6)
    """Lesions a slice, at most."""
    only: tuple[str, ...] = ()
    """Draw only lesions of these combinations, such as "margin=spiculated&density=solid"."""
    without: tuple[str, ...] = ()
    """Never draw lesions of these combinations."""

    def source(self) -> Source:
        return InsertedPhantoms(
            path=self.path, variants=self.variants, seed=self.phantom_seed, held_out=self.held_out,
            lesion_free=self.lesion_free,
            options=Options(max_lesions=self.max_lesions, only=self.only, without=self.without),
        )  # fmt: skip


SOURCES: dict[str, tuple[type[Config], tuple[str, ...]]] = {
    **ingest_config.SOURCES,
    "skincon": (SkinConConfig, ("annotations",)),
    "idrid": (IdridConfig, ("path",)),
    "pannuke": (PanNukeConfig, ("path",)),
    "nuinsseg": (NuInsSegConfig, ("path",)),
    "slides": (SlidesConfig, ("path",)),
    "dicom-seg": (DicomSegConfig, ("path",)),
    "rtstruct": (RtStructConfig, ("path",)),
    "nifti-labels": (NiftiLabelsConfig, ("path",)),
    "masks": (MasksConfig, ("path",)),
    "webdataset": (WebDatasetConfig, ("path",)),
    "phantoms-in-ct": (PhantomsInCtConfig, ("path",)),
}
"""By the name on the command line: the config and which of its fields are positional."""
