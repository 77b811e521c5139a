"""The step of the image that installs: the wheel holds every file that the packages read at run time."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("meddam_core", "qa_library", "ray_jobs")


@pytest.mark.slow
def test_the_wheel_holds_all_that_is_read(tmp_path: Path) -> None:
    source = tmp_path / "src"  # as the Dockerfile copies it, and where a build leaves nothing in the checkout
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.split("\n") if name and not name.endswith((".gitkeep", ".md"))}
    assert sorted(tracked - held) == []
    assert "entry_points.txt" in " ".join(held)
