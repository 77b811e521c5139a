"""Lesions of the CT phantoms in real slices: the truth of the synthetic, the surroundings of the real.

    meddam ingest phantoms-in-ct /data/ct --licence CC-BY-3.0 --egress open --held-out 0.2 --out s3://bucket/inserted

Every axial CT slice below the folder (or that a pattern such as "/data/*/large/*.dcm" names) gets lesions and vessels
at places inside its lungs, in HU, at the scale of its patient. Licence and egress are the slices': they must be told.

Invariants:
- a pixel that no lesion or vessel touches keeps its value, but for the enlargement that a lesion of 48 pixels needs;
- a patient is in one split: a hash of the PatientID decides, so that other folders and later runs agree;
- facts that the slice's own contents could belie (how many lesions, the nearest other one, what is normal) are labels
  only where `lesion_free` vouches for the slices.

Arrays: H rows, W columns.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, load_file
from meddam_core.datasets.dicom_index import head_of
from meddam_core.datasets.phantoms import ct
from meddam_core.datasets.phantoms.lungs import Lungs, find_lungs
from meddam_core.datasets.phantoms.outline import Float, Rng
from meddam_core.datasets.phantoms.phantom import Options, check_options, paint_ct
from meddam_core.datasets.phantoms.scene import Field, draw_scene
from meddam_core.datasets.phantoms.texture import noise
from meddam_core.datasets.phantoms.truth import PhantomRegion
from meddam_core.datasets.tables import files_below, names_digest, relative
from meddam_core.imaging.decoded import Decoded, Stored
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.windows import physical_values
from meddam_core.records import Egress, Reason, RowError
from meddam_core.regions.masks import rle_of

VERSION = 1
UNSURE = ("number", "neighbour", "neighbour_direction")
"""Labels that a slice's own lesions could belie."""
MIN_SIDE = 768
"""Smaller slices are enlarged by a whole number: a lesion has at least 48 pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertedPhantoms(Source):
    """`variants` pictures of each slice. Raises ValueError for lesions that cannot be drawn."""

    path: str
    """Folder of CT slices in DICOM, or a pattern of their names with * and ?, on S3 or disk."""
    variants: int = 1
    seed: int = 0
    held_out: float = 0.0
    """Share of patients whose slices are of split "test"; the others' are of split "train"."""
    lesion_free: bool = False
    """The slices show no lesion of their own: somebody looked."""
    options: Options = field(default_factory=Options)
    dataset: str = "phantoms-in-ct"
    licence: str = "unknown"
    egress: Egress = "deny"

    def __post_init__(self) -> None:
        if self.options.surroundings != "anatomy":
            raise ValueError("lesions in real slices have real surroundings; leave --surroundings away")
        check_options("ct", self.options)

    def fingerprint(self) -> str:
        """Of the settings and the names and sizes of the files."""
        return hashlib.sha256(f"{VERSION} {self!r} {names_digest(self._files())}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a picture to be made. Raises ValueError where no file is a CT slice."""
        found = False
        for entry in self._files():
            header = head_of(entry.uri)
            if header is None or header.text("Modality") != "CT" or header.integer("Columns") is None:
                continue
            found = True
            patient = header.text("PatientID")
            problems = [] if patient or not self.held_out else [
                Problem(reason=Reason.BAD_ANNOTATION, detail="the file names no patient, so no split can be dealt")
            ]  # fmt: skip
            for variant in range(self.variants):
                yield SourceItem(
                    key=f"{relative(entry.uri, self._folder())}#{variant}", uri=entry.uri, recipe="phantom-ct",
                    split=self.split_of(patient or ""), problems=problems,
                )  # fmt: skip
        if not found:
            raise ValueError(f"{self.path} names no CT slice in DICOM; give a folder, or a pattern of file names")

    def split_of(self, patient_id: str) -> str:
        """train or test, by a hash of the identifier; "all" where none are held out."""
        if not self.held_out:
            return "all"
        number = int.from_bytes(hashlib.sha256(patient_id.strip().encode()).digest()[:8], "big")
        return "test" if number / 2**64 < self.held_out else "train"

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The slice with lesions in it. Raises RowError(excluded) where it has no place for one."""
        decoded = load_file(item, limits)
        rng = np.random.default_rng([self.seed, *hashlib.sha256(item.key.encode()).digest()[:8]])
        picture, regions = insert(decoded, rng, self.options, lesion_free=self.lesion_free)
        return picture, [
            SourceRegion(ordinal=i, segmentation=asdict(rle_of(r.mask_HW)), labels=r.labels())
            for i, r in enumerate(regions)
        ]

    def _folder(self) -> str:
        """The part of the path before its first wildcard."""
        wild = min((self.path.find(c) for c in "*?[" if c in self.path), default=-1)
        return self.path if wild < 0 else self.path[:wild].rpartition("/")[0]

    def _files(self) -> list[storage.ObjectInfo]:
        found, folder = files_below(self._folder(), ("",)), self._folder()
        if folder == self.path:
            return found
        pattern = self.path[len(folder) + 1 :]
        return [o for o in found if fnmatch.fnmatchcase(relative(o.uri, folder), pattern)]


def insert(decoded: Decoded, rng: Rng, options: Options, *, lesion_free: bool) -> tuple[Decoded, list[PhantomRegion]]:
    """A slice with lesions in its lungs, and their regions. Raises RowError(excluded) where there is no place."""
    spacing = decoded.pixel_spacing_mm
    if spacing is None or decoded.stored.ndim != 2 or decoded.height != decoded.width or decoded.rescale is None:
        raise RowError(Reason.EXCLUDED, "lesions are put into square CT slices in HU with a pixel spacing")
    hu_HW = physical_values(decoded, decoded.stored)
    try:
        lungs = find_lungs(hu_HW, spacing, decoded.orientation)
    except ValueError as error:
        raise RowError(Reason.EXCLUDED, str(error)) from None
    factor = -(-MIN_SIDE // decoded.height)
    stored_HW = _enlarged(decoded, factor)
    large_HW = physical_values(decoded, stored_HW).astype(np.float32)
    scene = draw_scene(
        "ct", rng, _field(lungs, factor, len(stored_HW), spacing[0] / factor), options.allows(ct.draw_look),
        ct.DISTRACTOR, options.max_lesions,
    )  # fmt: skip
    if not scene.lesions:
        raise RowError(Reason.EXCLUDED, "the lungs of this slice have no place for a lesion")
    painted_HW = large_HW.copy()
    regions = paint_ct(rng, painted_HW, scene, lambda x, y: {
        "side": lungs.side(x / factor), "zone": lungs.zone(y / factor)
    })  # fmt: skip
    in_lung_HW = cv2.resize(lungs.mask_HW.astype(np.uint8), None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    changed_HW = (np.abs(painted_HW - large_HW) > 0.5) & (in_lung_HW > 0)  # spicules end at the chest wall
    grain = _grain(hu_HW) * noise(rng, len(stored_HW), 1.5 * factor)
    painted_HW = np.where(changed_HW, painted_HW + grain * _cover(changed_HW), large_HW)
    picture = replace(
        decoded, stored=_stored(painted_HW, stored_HW, changed_HW, decoded), context=(),
        pixel_spacing_mm=(spacing[0] / factor, spacing[1] / factor),
    )  # fmt: skip
    known = [r for r in regions if lesion_free or r.truth["kind"] != "normal"]
    return picture, known if lesion_free else [
        replace(r, truth={k: v for k, v in r.truth.items() if k not in UNSURE}) for r in known
    ]  # fmt: skip


def _field(lungs: Lungs, factor: int, size: int, spacing_mm: float) -> Field:
    ring = np.linspace(0, 2 * np.pi, 24, endpoint=False)

    def inside(x: float, y: float, radius: float) -> bool:
        reach = np.concatenate([[0.0], np.full(24, 0.5), np.full(24, 1.0)]) * radius
        angle = np.concatenate([[0.0], ring, ring])
        columns = ((x + reach * np.cos(angle)) / factor).astype(int)
        rows = ((y + reach * np.sin(angle)) / factor).astype(int)
        limit = lungs.mask_HW.shape[0] - 1
        hit = lungs.mask_HW[np.clip(rows, 0, limit), np.clip(columns, 0, limit)]
        return bool(hit.all())

    return Field(size=size, width_px=lungs.width_px * factor, inside=inside, spacing_mm=spacing_mm)


def _enlarged(decoded: Decoded, factor: int) -> Stored:
    """Each pixel as `factor` x `factor`, by cubic interpolation, within the values that the slice has."""
    stored = decoded.stored
    if factor == 1:
        return stored
    values: Any = cv2.resize(stored.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    values = np.clip(np.rint(values), int(stored.min()), int(stored.max())).astype(stored.dtype)
    if decoded.padding:
        nearest = np.kron(stored, np.ones((factor, factor), stored.dtype))
        outside = (nearest >= decoded.padding[0]) & (nearest <= decoded.padding[1])
        values[outside] = nearest[outside]
    return values  # type: ignore[no-any-return]


def _grain(hu_HW: NDArray[np.floating]) -> float:
    """The scanner's noise, HU: the deviation of neighbouring pixels in soft tissue."""
    steps = np.diff(hu_HW, axis=1)
    soft = (np.abs(hu_HW[:, 1:] - 40) < 80) & (np.abs(hu_HW[:, :-1] - 40) < 80)
    if soft.sum() < 100:
        return 15.0
    return float(np.clip(np.median(np.abs(steps[soft])) / 0.954, 3, 60))


def _cover(changed_HW: NDArray[np.bool_]) -> Float:
    """1 well inside what was painted, 0 at its rim, where the slice's own noise shows through."""
    return cv2.GaussianBlur(changed_HW.astype(np.float32), (0, 0), 2.0).astype(np.float32)


def _stored(hu_HW: Float, before_HW: Stored, changed_HW: NDArray[np.bool_], decoded: Decoded) -> Stored:
    """HU as stored values where something was painted; all else stays, bit for bit."""
    assert decoded.rescale is not None
    values = np.rint((hu_HW - decoded.rescale.intercept) / decoded.rescale.slope)
    values = np.clip(values, 0, 2**decoded.stored_bits - 1).astype(before_HW.dtype)
    return np.where(changed_HW, values, before_HW)
