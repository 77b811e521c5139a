"""The SkinCon source: skin photographs of Fitzpatrick17k (or DDI) with 48 clinical concepts for each.

    meddam ingest skincon annotations_fitzpatrick17k.csv --images fitzpatrick17k/images --out s3://bucket/skincon \\
        --fitzpatrick fitzpatrick17k.csv

- The concept table: ImageID (`<md5hash>.jpg`; DDI_file in DDI's), 48 columns of 0 or 1, "Do not consider this image".
  What is marked so is excluded, which leaves the paper's 3,230 of 3,690.
- Fitzpatrick17k's table, if given: md5hash, fitzpatrick_scale (1 to 6, -1 unknown), qc.
- The photographs: a folder or bucket with files named by the hash, with whichever suffix they were downloaded as.

The concepts are of the whole photograph: they become the image's labels. Regions come later, from the recipe's lesion
detector in the caption job, and take the labels over: a concept may lie outside a region. The skin type is a label of
its own name, `fitzpatrick_skin_type`, for results by group; no question is asked about it.

Source of the names: header of annotations_fitzpatrick17k.csv (Daneshjou et al., SkinCon, NeurIPS 2022), in its order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

from meddam_core.datasets.base import Problem, Source, SourceItem
from meddam_core.datasets.manifest import resolve
from meddam_core.datasets.tables import digest_of, files_below, names_digest, stem, table_columns, table_rows
from meddam_core.records import Egress, Label, Reason

VERSION = 1
"""Of what this adapter makes of the same tables."""
SKIN_TYPE = "fitzpatrick_skin_type"
EXCLUDED = "Do not consider this image"
_TABLE, _FITZPATRICK = "SkinCon's concept table", "Fitzpatrick17k's table"
_ID_COLUMNS = ("ImageID", "DDI_file")
_WRONG = "3 Wrongly labelled"
_STATES = {"1": "present", "1.0": "present", "0": "absent", "0.0": "absent"}


@cache
def concepts() -> tuple[str, ...]:
    """The 48 concepts, as the table spells them."""
    text = resources.files("meddam_core.datasets").joinpath("skincon_concepts.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkinCon(Source):
    """SkinCon's concepts with Fitzpatrick17k's (or DDI's) photographs."""

    annotations: str
    """The concept table, on S3 or disk."""
    images: str
    """Folder of the photographs."""
    fitzpatrick: str | None = None
    """Fitzpatrick17k's table, for the skin type and its quality control."""
    drop_wrongly_labelled: bool = False
    """Leave out what Fitzpatrick17k's quality control found wrongly labelled."""
    split: str = "all"
    dataset: str = "skincon"
    licence: str = "CC BY-NC-SA 3.0"
    egress: Egress = "deny"

    def __post_init__(self) -> None:
        if self.drop_wrongly_labelled and self.fitzpatrick is None:
            raise ValueError("what is wrongly labelled stands in Fitzpatrick17k's own table; give --fitzpatrick FILE")

    def fingerprint(self) -> str:
        """Of the settings, the tables and the photographs' names. The photographs themselves are not read."""
        parts = [f"{VERSION} {self!r}", digest_of(self.annotations, _TABLE), names_digest(files_below(self.images))]
        parts += [digest_of(self.fitzpatrick, _FITZPATRICK)] if self.fitzpatrick else []
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a line of the concept table. Raises ValueError for a table of another kind."""
        name = self._id_column()
        photographs = {stem(o.uri): o.uri for o in files_below(self.images)}
        skin = self._skin()
        seen: set[str] = set()
        for row in table_rows(self.annotations, _TABLE):
            image_id = row[name]
            problem = self._problem(image_id, row, skin, seen)
            seen.add(image_id)
            if problem is not None:
                yield SourceItem(key=image_id, problems=[problem])
                continue
            yield SourceItem(
                key=image_id, uri=photographs.get(stem(image_id)) or resolve(image_id, self.images), split=self.split,
                modality="XC", recipe="skincon", labels=_labels(row, skin.get(stem(image_id), ("", ""))[0]),
            )  # fmt: skip

    def _id_column(self) -> str:
        columns = table_columns(self.annotations, _TABLE)
        missing = [c for c in (*concepts(), EXCLUDED) if c not in columns]
        names = [c for c in _ID_COLUMNS if c in columns]
        if missing or not names:
            lacking = missing[0] if missing else _ID_COLUMNS[0]
            raise ValueError(f"{self.annotations} is not {_TABLE}: it has no column {lacking!r}; check its name")
        return names[0]

    def _skin(self) -> dict[str, tuple[str, str]]:
        """(skin type, quality control) by hash, of 17 thousand lines."""
        if self.fitzpatrick is None:
            return {}
        rows = table_rows(self.fitzpatrick, _FITZPATRICK, needed=("md5hash", "fitzpatrick_scale", "qc"))
        return {row["md5hash"]: (row["fitzpatrick_scale"].removesuffix(".0"), row["qc"]) for row in rows}

    def _problem(
        self, image_id: str, row: dict[str, str], skin: dict[str, tuple[str, str]], seen: set[str]
    ) -> Problem | None:
        if not image_id:
            return Problem(reason=Reason.BAD_ANNOTATION, detail="a line names no photograph")
        if image_id in seen:
            return Problem(reason=Reason.DUPLICATE_ID, detail="two lines name the same photograph")
        if _STATES.get(row[EXCLUDED]) == "present":
            return Problem(reason=Reason.EXCLUDED, detail="marked as not to be considered")
        if self.drop_wrongly_labelled and skin.get(stem(image_id), ("", ""))[1] == _WRONG:
            return Problem(reason=Reason.EXCLUDED, detail="wrongly labelled, by Fitzpatrick17k's quality control")
        return None


def _labels(row: dict[str, str], skin_type: str) -> list[Label]:
    """What the line says of each concept; one that is neither 0 nor 1 is undecided."""
    labels = [Label(name=name, value=_STATES.get(row[name], "undecided")) for name in concepts()]
    known = skin_type in ("1", "2", "3", "4", "5", "6")
    return [*labels, Label(name=SKIN_TYPE, value=skin_type)] if known else labels
