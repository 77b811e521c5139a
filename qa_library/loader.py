"""Reads template sets and concepts; the shipped ones are package data, a lab's own come from a folder.

library = load_library()                       # shipped
library = load_library("templates/")           # shipped, plus own YAML files; equal ids replace
library.find("vindr-cxr", "DX").attribute("finding").value("pneumothorax").terms
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qa_library.schema import TemplateSet

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Code:
    """A code of a concept in a public vocabulary."""

    system: str
    code: str
    display: str


@dataclass(frozen=True)
class Library:
    """Template sets by id, coded concepts by name, and a version for the run's fingerprint."""

    sets: dict[str, TemplateSet]
    concepts: dict[str, tuple[Code, ...]] = field(default_factory=dict)
    version: str = ""
    """First 12 hex digits of the SHA-256 of all files read."""

    def find(self, dataset: str, modality: str | None = None) -> TemplateSet | None:
        """The set for a dataset's name ("vindr-cxr", "vindr_cxr/14-class") and modality; None if there is none."""
        wanted = _key(dataset)
        for candidate in self.sets.values():
            names = {_key(name) for name in (candidate.id, *candidate.datasets)}
            fits = not candidate.modalities or modality is None or modality in candidate.modalities
            if fits and any(wanted == name or wanted.startswith(name + "-") for name in names):
                return candidate
        return None


def load_library(extra: str | Path | None = None) -> Library:
    """The shipped library, with the template sets of a folder added or replaced.

    Raises ValueError naming the file and what is wrong in it.
    """
    if extra is None:
        return _shipped()
    folder = Path(extra)
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else [folder]
    if not files:
        raise ValueError(f"no .yaml template in {folder}")
    shipped = _shipped()
    sets = dict(shipped.sets)
    digest = hashlib.sha256(shipped.version.encode())
    for file in files:
        loaded = read_template_set(file)
        sets[loaded.id] = loaded
        digest.update(file.read_bytes())
    return Library(sets, shipped.concepts, digest.hexdigest()[:12])


def read_template_set(file: str | Path) -> TemplateSet:
    """One template file. Raises ValueError naming the file and each fault."""
    content = _read_yaml(Path(file))
    try:
        return TemplateSet.model_validate(content)
    except ValidationError as e:
        faults = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors(include_input=False))
        raise ValueError(f"{Path(file).name}: {faults}") from e


def load_concepts(extra: str | Path | None = None) -> dict[str, tuple[Code, ...]]:
    """Coded concepts: the shipped RadLex and DICOM codes, and a user's own file of the same form (say, SNOMED CT)."""
    concepts = _read_concepts(_FOLDER / "concepts.yaml")
    if extra is not None:
        for name, codes in _read_concepts(Path(extra)).items():
            concepts[name] = concepts.get(name, ()) + codes
    return concepts


@cache
def _shipped() -> Library:
    files = sorted((_FOLDER / "templates").glob("*.yaml"))
    sets = {s.id: s for s in map(read_template_set, files)}
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in [*files, _FOLDER / "concepts.yaml"]))
    return Library(sets, load_concepts(), digest.hexdigest()[:12])


def _read_concepts(file: Path) -> dict[str, tuple[Code, ...]]:
    content = _read_yaml(file)
    systems, concepts = content.get("systems", {}), content.get("concepts", {})
    unknown = {c["system"] for entry in concepts.values() for c in entry.get("codes", ())} - set(systems)
    if unknown:
        raise ValueError(f"{file.name}: the code systems {sorted(unknown)} are not described under `systems`")
    return {name: tuple(Code(**c) for c in entry.get("codes", ())) for name, entry in concepts.items()}


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise ValueError(f"{file.name} is not YAML: {str(e).splitlines()[0]}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no mapping")
    return content


def _key(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
