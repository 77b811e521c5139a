"""The image without an engine: its steps are run here, in a new environment, by the lines of the Dockerfile itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("meddam_core", "qa_library", "ray_jobs")
DOCKERFILE = (ROOT / "cluster/Dockerfile").read_text().replace("\\\n", " ")
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def steps(word: str) -> list[str]:
    """What stands behind `word` (RUN, ARG, ENV ...) in the Dockerfile's lines, comments aside."""
    return [line.partition(" ")[2].strip() for line in DOCKERFILE.splitlines() if line.startswith(word + " ")]


def copied(source: Path) -> None:
    """What the Dockerfile copies, where a build leaves nothing in the checkout."""
    source.mkdir()
    for step in steps("COPY"):
        for name in step.split()[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source)


def test_pip_installs_by_pins_alone() -> None:
    pip = [one.strip() for step in steps("RUN") for one in re.split(r"&&|;|\bthen\b", step) if "pip install" in one]
    assert len(pip) == 3
    for command in pip:
        assert "-c constraints.txt" in command or re.search(r"\$\(grep '\^\S+==' constraints.txt\)", command), command
    for name in ("torch", "ray", "deepspeed-mii", "transformers", "pyarrow"):
        assert name in PINS
    assert ":latest" not in DOCKERFILE
    assert not any("://" in step for step in steps("RUN")), "nothing is fetched past pip and apt"


@pytest.mark.parametrize("has_python", [True, False], ids=["slim", "cuda"])
def test_every_base_gets_what_ray_up_and_the_probes_call(tmp_path: Path, has_python: bool) -> None:
    """The step runs here, with stand-ins for the commands that would change this machine."""
    stand_ins = {"apt-get": 'echo apt-get "$@" >>"$CALLS"; case "$*" in *python3.12*) cp "$0" "$BIN/python3.12";; esac',
                 "rm": ":"} | ({"python3.12": 'echo python "$@" >>"$CALLS"'} if has_python else {})  # fmt: skip
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "cp").symlink_to(shutil.which("cp") or "")
    env = {"PATH": str(folder), "CALLS": str(calls), "BIN": str(folder)}
    bash = shutil.which("bash") or ""
    subprocess.run([bash, "-ec", steps("RUN")[0]], env=env, check=True)
    (installed,) = (line.split() for line in calls.read_text().splitlines() if "apt-get install" in line)
    assert {"rsync", "openssh-client", "wget", "ca-certificates"} <= set(installed)
    assert ("python3.12-venv" in installed) == (not has_python)


def test_a_submitted_job_uploads_the_code_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import _zip_files

    source, archive = tmp_path / "checkout", tmp_path / "uploaded.zip"
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    code = {name for name in listed.stdout.split("\n") if name.endswith((".py", ".yaml", ".txt"))}
    beside = {"ray_token", "secret", "secret.txt", "crosswalk.csv", "meddam.sif", "meddam.tar", "wheels/torch.whl"}
    for name in code | beside:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    excludes = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())["excludes"]
    _zip_files(str(source), excludes, str(archive), include_gitignore=False)
    uploaded = {name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/")}
    assert "ray_jobs/crosswalk.py" in uploaded and uploaded == code
    ignored = subprocess.run(["git", "check-ignore", *beside], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(ignored.stdout.split()) == beside, "and git does not take it either"


def test_a_login_shell_finds_what_is_installed(tmp_path: Path) -> None:
    (step,) = (step for step in steps("RUN") if "/etc/profile.d/" in step)
    profile = tmp_path / "meddam.sh"
    written = step.partition("&& echo ")[2].replace("/etc/profile.d/meddam.sh", str(profile))
    script = f"echo {written}\nPATH=/usr/bin:/bin\n. {profile}\necho $PATH"
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True)
    assert done.stdout == "/opt/meddam/bin:/usr/bin:/bin\n"


def test_without_a_network_the_image_is_carried_whole() -> None:
    page = (ROOT / "cluster/airgapped/README.md").read_text()
    (archive,) = re.findall(r"docker save -o (\S+)", page)
    for line in (f"docker load -i {archive}", f"apptainer build meddam.sif docker-archive://{archive}"):
        assert line in page
    assert f"docker-archive://{archive}" in (ROOT / "cluster/slurm/caption.sbatch").read_text()
    assert "docker build" not in page, "apt-get and the base image want a network"


@pytest.mark.slow
def test_the_wheel_holds_all_that_is_read(tmp_path: Path) -> None:
    copied(tmp_path / "src")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "src")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.split("\n") if name and not name.endswith((".gitkeep", ".md"))}
    assert sorted(tracked - held) == []
    assert "entry_points.txt" in " ".join(held)


@pytest.mark.slow
def test_the_steps_of_the_image_make_an_environment_that_works(tmp_path: Path) -> None:
    """Without an index: what this environment holds already is found there, the product is built and installed anew."""
    venv, source, home = tmp_path / "venv", tmp_path / "src", tmp_path / "home"
    home.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (site,) = (venv / "lib").glob("python3*/site-packages")
    for old in site.glob("setuptools*"):  # venv's own hides the one that torch and the build ask for
        shutil.rmtree(old)
    (site / "held.pth").write_text(sysconfig.get_path("purelib"))
    copied(source)
    values = dict(step.split("=", 1) for step in steps("ARG") if "=" in step)
    values = {name: value.strip('"') for name, value in values.items()}
    values |= {"PIP_OPTIONS": "--no-index --no-build-isolation", "EXTRAS": values["EXTRAS"] + ",mii"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAY_", "AWS_", "VIRTUAL_ENV"))}
    env = kept | values | {"PATH": f"{venv}/bin:/usr/bin:/bin", "HOME": str(home), "RAY_AUTH_MODE": "token"}
    made, installed, *others = steps("RUN")
    assert made.endswith("python3.12 -m venv /opt/meddam") and "useradd" in others[1]
    for step in (installed, others[0], others[2]):
        here = step.replace("/opt/meddam", str(venv)).replace("/src", str(source))
        cwd = source if source.exists() else home
        done = subprocess.run(["bash", "-ec", here], cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{here}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert not source.exists(), "the sources do not stay in the image"
    said = subprocess.run(
        [venv / "bin/meddam", "--help"], cwd=home, env=env, capture_output=True, text=True, check=True
    )
    assert "not for diagnosis" in " ".join(said.stdout.split())
    where = subprocess.run(
        [venv / "bin/python", "-c", "import ray_jobs; print(ray_jobs.__file__)"], cwd=home, env=env,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site)), "the installed product is what runs"
    bill = json.loads((venv / "sbom.cdx.json").read_text())
    listed = {c["purl"] for c in bill["components"]}
    for name in ("ray", "pydicom", "pyarrow", "transformers", "deepspeed-mii"):
        assert f"pkg:pypi/{name}@{PINS[name]}" in listed
