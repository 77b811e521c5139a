"""What the documentation says works: `bash` blocks are run, every other `meddam` line is checked for its options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from meddam_core.records import Reason, Status
from ray_jobs import cli, summary
from tests.ray_jobs.made_shards import make_shards

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MODEL = "tests/data/oracle/dam_tiny/checkpoint"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[str]:
    for found, text in FENCE.findall(page.read_text()):
        if found == language:
            yield text


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, arguments) of every line that starts with `meddam` or runs the job module."""
    for page in PAGES:
        for _, text in FENCE.findall(page.read_text()):
            for line in text.replace("\\\n", " ").splitlines():
                if not re.match(r"\s*(meddam|python -m ray_jobs|ray job)", line):
                    continue
                words = shlex.split(line, comments=True)
                if words[:1] == ["meddam"]:
                    yield page.name, words[1:]
                elif "ray_jobs.caption" in words:
                    yield page.name, ["caption", *words[words.index("ray_jobs.caption") + 1 :]]


@pytest.mark.parametrize(("page", "args"), list(commands()))
def test_every_command_has_the_options_it_is_shown_with(page: str, args: list[str]) -> None:
    command, name = typer.main.get_command(cli.app), "meddam"
    context = command.make_context(name, list(args))
    while hasattr(command, "resolve_command"):
        name, command, args = command.resolve_command(context, args)
        assert command is not None
        context = command.make_context(name, list(args), parent=context)
    given = dict(context.params)
    file = given.pop("config_file", None)
    if hasattr(command.callback, "build") and file is None:  # what a file would add is known to its page alone
        given.pop("as_json")
        command.callback.build(given)  # raises where a setting is missing, or its value is none


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the `bash` blocks may count on: $SHARDS, $MODEL, a finished $RUN, and `meddam` on the path."""
    place = tmp_path_factory.mktemp("docs")
    shards, run = make_shards(str(place / "set"), 1, 10), str(place / "run")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"SHARDS": shards, "RUN": run, "MODEL": MODEL, "PATH": path}
    command = f"meddam caption {shards} --out {run} --model {MODEL} --max-new-tokens 8 --num-cpus 2"
    subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, check=True, capture_output=True)
    return env


def _bash_blocks() -> Iterator[Any]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, "bash")):
            slow = "pydicom-samples" in block  # `make demo` types these very commands
            yield pytest.param(page, block, id=f"{page.name}-{number}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("page", "block"), list(_bash_blocks()))
def test_bash_blocks_run(page: Path, block: str, environment: dict[str, str], tmp_path: Path) -> None:
    # Run where the repository is, but let what they write land elsewhere.
    for name in ("tests", "meddam_core", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "set -euo pipefail\n" + block
    env = environment | {"MODEL": str(ROOT / MODEL)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page.name}:\n{done.stdout}\n{done.stderr}"


def test_links_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_page_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in sorted((ROOT / "docs").glob("*.md")) if f"docs/{p.name}" not in readme] == []


def test_every_reason_status_and_exit_code_is_explained() -> None:
    rows = (ROOT / "docs/rows-and-shards.md").read_text()
    assert [c for c in (*Reason, *Status) if f"`{c.value}`" not in rows] == []
    runs = (ROOT / "docs/runs.md").read_text()
    codes = [0, 1, cli.EXIT_INTERRUPTED, *(v for n, v in vars(summary).items() if n.startswith("EXIT_"))]
    assert [c for c in codes if not re.search(rf"^\| {c} \|", runs, re.MULTILINE)] == []


def test_who_types_what_the_readme_says_has_the_commands_on_the_path() -> None:
    typed = [line for block in blocks(ROOT / "README.md", "") for line in block.splitlines()]
    (activated,) = (n for n, line in enumerate(typed) if line.startswith(". .venv/bin/activate"))
    assert activated < min(n for n, line in enumerate(typed) if line.startswith(("meddam ", "ray ")))
    assert "VENV ?= .venv\n" in (ROOT / "Makefile").read_text()


def test_the_picture_is_small_enough_to_load() -> None:
    assert (ROOT / "docs/img/report.jpg").stat().st_size < 400_000


def test_every_measured_figure_stands_in_the_log_with_its_command() -> None:
    log = " ".join((ROOT / "benchmarks/LOG.md").read_text().split())
    rows = [line.split(" | ") for line in (ROOT / "docs/measurements.md").read_text().splitlines() if "`python" in line]
    assert len(rows) > 6
    for _, command, figures, _ in rows:
        words = command.strip("`").split()
        program = words[2] if words[1] == "-m" else words[1]
        assert program in log and (ROOT / f"{program.removesuffix('.py').replace('.', '/')}.py").exists(), command
        for figure in re.findall(r"\d[\d,.]*\d(?:x| %)?", figures):
            assert figure in log, f"{figure} of {command} is in no entry of the log"
