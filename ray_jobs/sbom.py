"""What is installed where this runs, as a CycloneDX 1.6 bill of materials: for scanners, and for whoever must know.

    meddam sbom --out sbom.cdx.json        the image holds its own as /opt/meddam/sbom.cdx.json

Names every Python distribution of the environment with its version, package URL, licence and what it needs, from the
metadata that pip wrote; nothing is asked of any index. The system's own packages are the base image's: its scanner or
SBOM knows those. The same environment gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import uuid
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from pydantic import BaseModel, ConfigDict

from ray_jobs.module_command import run_as

PRODUCT = "meddam"
_LICENCE_FILE = re.compile(r"\n|.{80}")
"""Some packages put a licence's whole text where its name belongs."""


class Config(BaseModel):
    """What `meddam sbom` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: Path | None = None
    """File to write; by default it is printed."""


class Summary(BaseModel):
    """The bill of materials."""

    out: str | None
    num_components: int
    bill: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """An environment that can be listed is listed whole."""
        return 0

    def lines(self) -> list[str]:
        """The bill itself, or where it is."""
        if self.out is None:
            return [json.dumps(self.bill, indent=2)]
        return [f"{self.num_components:,} packages: {self.out}"]


def run(cfg: Config) -> Summary:
    """Lists the environment that this process runs in."""
    bill = bill_of(list(distributions()))
    if cfg.out is not None:
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        cfg.out.write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")
    return Summary(out=None if cfg.out is None else str(cfg.out), num_components=len(bill["components"]), bill=bill)


def bill_of(found: list[Distribution]) -> dict[str, Any]:
    """CycloneDX 1.6 of distributions; of one that is there twice the first counts, as for Python's own import."""
    installed: dict[str, Distribution] = {}
    for one in found:
        installed.setdefault(_name(one.metadata["Name"] or ""), one)
    installed.pop("", None)
    product = installed.pop(PRODUCT, None)
    components = [_component(name, one) for name, one in sorted(installed.items())]
    known = {name: component["bom-ref"] for name, component in zip(sorted(installed), components, strict=True)}
    root = {"type": "application", "name": PRODUCT, "bom-ref": PRODUCT, "version": product.version if product else "0"}
    edges = [(PRODUCT, product)] if product else []
    edges += [(known[name], one) for name, one in sorted(installed.items())]
    content = json.dumps([c["purl"] for c in components])
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "serialNumber": f"urn:uuid:{uuid.UUID(hashlib.sha256(content.encode()).hexdigest()[:32], version=4)}",
        "metadata": {
            "component": root,
            "properties": [
                {"name": "python", "value": platform.python_version()},
                {"name": "platform", "value": f"{sys.platform}-{platform.machine()}"},
            ],
        },
        "components": components,
        "dependencies": [{"ref": ref, "dependsOn": _needs(one, known)} for ref, one in edges],
    }  # fmt: skip


def _component(name: str, one: Distribution) -> dict[str, Any]:
    version = one.version
    purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    component: dict[str, Any] = {
        "type": "library", "bom-ref": purl, "name": one.metadata["Name"], "version": version, "purl": purl,
    }  # fmt: skip
    licence = _licence(one)
    return component | ({"licenses": [licence]} if licence else {})


def _licence(one: Distribution) -> dict[str, Any] | None:
    """The SPDX expression where the metadata has one, else the name that its author gave."""
    said = {key: one.metadata.get_all(key) or [""] for key in ("License-Expression", "License", "Classifier")}
    if said["License-Expression"][0]:
        return {"expression": said["License-Expression"][0]}
    classifiers = [c for c in said["Classifier"] if c.startswith("License ::")]
    text = said["License"][0]
    name = classifiers[-1].rpartition(" :: ")[2] if classifiers else "" if _LICENCE_FILE.search(text) else text.strip()
    return {"license": {"name": name}} if name and name != "UNKNOWN" else None


def _needs(one: Distribution, known: dict[str, str]) -> list[str]:
    """What of the environment it asks for, extras aside."""
    needed = set()
    for text in one.requires or []:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue  # an old package's own spelling: it is listed, its wish is not
        if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and _name(wanted.name) in known:
            needed.add(known[_name(wanted.name)])
    return sorted(needed)


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


if __name__ == "__main__":  # the same options as `meddam sbom`
    run_as("sbom")
