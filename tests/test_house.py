"""The rules of the house that no linter knows: what may be imported, caught, left unfinished, how long a file is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import grimp
import pytest
import typer

from ray_jobs import cli

ROOT = Path(__file__).parent.parent
PACKAGES = ("meddam_core", "qa_library", "ray_jobs")
MAX_LINES = 400
LONGER = {
    "meddam_core/records.py": 450,  # the only definition of a row, on one page
    "meddam_core/dam/config.py": 450,  # a list: every key of a checkpoint's configuration
}

BROAD_EXCEPTS = {
    "meddam_core/imaging/decode.py",  # the door to other people's decoders
    "meddam_core/imaging/codecs.py",  # a Rust panic, which is no Exception
    "meddam_core/imaging/dicom_header.py",  # pydicom converts values when asked, and raises a dozen kinds
    "meddam_core/engines/loop.py",  # handed on to the callers, who would otherwise wait for ever
    "meddam_core/engines/mii/engine.py",  # after half a forward nothing that follows could be trusted
    "meddam_core/engines/mii/ops.py",  # compilers and linkers raise what they like
    "ray_jobs/actors.py",  # the one row boundary of the caption job
    "ray_jobs/caption.py",  # the breaker: re-raises whatever it did not cause
    "ray_jobs/serve/guards.py",  # the door of the endpoint: whatever a route raised, the client gets a clean error
    "ray_jobs/session.py",  # a start of Ray that took too long has no type of its own
    "ray_jobs/process_end.py",  # prints the traceback that the interpreter would print
    "ray_jobs/lease.py",  # a renewal that fails for any reason counts as lost
}
"""Files that may catch Exception, each with its reason."""


def tracked(suffix: str) -> list[Path]:
    """Files that git knows, or in an unpacked archive simply all."""
    listed = subprocess.run(["git", "ls-files", "-z", f"*{suffix}"], cwd=ROOT, capture_output=True, check=False)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    files = [ROOT / n for n in names if n and (ROOT / n).exists()]
    return files or [f for p in (*PACKAGES, "tests", "benchmarks") for f in (ROOT / p).rglob(f"*{suffix}")]


SOURCES = [f for f in tracked(".py") if f.relative_to(ROOT).parts[0] in (*PACKAGES, "tests", "benchmarks")]
PRODUCT = [f for f in SOURCES if f.relative_to(ROOT).parts[0] in PACKAGES]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("meddam_core", "ray torch transformers matplotlib pandas"),
        ("meddam_core.captioner", "ray torch transformers"),
        ("qa_library", "ray torch transformers"),
        ("ray_jobs.cli", "ray torch transformers albumentations matplotlib"),
    ],
)
def test_importing_is_light(module: str, forbidden: str) -> None:
    code = f"import {module}, sys; print(*[m for m in {forbidden.split()} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_no_module_of_the_core_reaches_ray() -> None:
    found = [
        f"{name(f)}:{node.lineno}"
        for f in PRODUCT
        if f.relative_to(ROOT).parts[0] != "ray_jobs"
        for node in ast.walk(ast.parse(f.read_text()))
        if "ray" in {m.split(".")[0] for m in imported(node)}
    ]
    assert found == []


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count: they hide a cycle from Python, not from a reader."""
    graph = grimp.build_graph(*PACKAGES)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order = TopologicalSorter(imported)
    order.prepare()  # raises CycleError, which names the modules


def test_files_fit_in_the_head() -> None:
    lengths = {name(f): len(f.read_text().splitlines()) for f in SOURCES}
    assert {n: length for n, length in lengths.items() if length > LONGER.get(n, MAX_LINES)} == {}


def test_every_module_says_what_it_is_for() -> None:
    assert [name(f) for f in SOURCES if f.read_text().strip() and not ast.get_docstring(ast.parse(f.read_text()))] == []


def test_no_folder_or_file_is_called_by_what_it_is_not() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert [name(f) for f in SOURCES if vague & {p.removesuffix(".py") for p in f.relative_to(ROOT).parts}] == []


def test_exceptions_are_caught_by_name() -> None:
    found = {name(f) for f in PRODUCT if any(broad(node) for node in ast.walk(ast.parse(f.read_text())))}
    assert found - BROAD_EXCEPTS == set()


def broad(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"BaseException"}
    return bool(names & {"Exception", "BaseException"})


def test_nothing_is_left_unfinished() -> None:
    signs = re.compile(r"\b(" + "|".join(["NotImplemented" + "Error", "TO" + "DO", "FIX" + "ME", "X" + "XX"]) + r")\b")
    assert [name(f) for f in SOURCES if signs.search(f.read_text())] == []


def test_no_path_of_a_machine_stands_in_the_tree() -> None:
    paths = re.compile(r"(^|[^A-Za-z0-9._])/(work|root|home/[a-z]+|Users|opt/wheels)/")
    texts = [f for s in (".py", ".md", ".toml", ".yaml", ".yml", ".json", "Makefile", "run") for f in tracked(s)]
    found = [name(f) for f in set(texts) if "data/oracle" not in name(f) and paths.search(f.read_text())]
    assert found == []


def test_the_versions_that_are_pinned_are_the_versions_that_are_asked_for() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert next(iter(pins)) == "torch"
    asked = [Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]]
    for requirement in asked:
        if requirement.name == project["name"]:
            continue
        assert requirement.specifier.contains(pins[requirement.name.replace("_", "-").lower()]), requirement


COMMANDS_WITHOUT_A_JOB = {"verify", "qa lint", "qa show"}
"""They read what lies on this machine: nothing to submit."""


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
    for word, command in group.commands.items():
        yield from commands(command, (*words, word)) if hasattr(command, "commands") else [" ".join((*words, word))]


def test_every_command_is_a_module_that_can_be_submitted() -> None:
    """`ray job submit -- python -m ray_jobs.judge ...`: a module without that line ends with 0 and does nothing."""
    found = re.compile(r'^if __name__ == "__main__":.*\n    run_as\((.*)\)$', re.MULTILINE)
    texts = [f.read_text() for f in PRODUCT if name(f).startswith("ray_jobs/")]
    words = [" ".join(ast.literal_eval(f"({m.group(1)},)")) for t in texts for m in found.finditer(t)]
    assert len(words) == len(set(words)) > 20
    wanted = {c for c in commands(typer.main.get_command(cli.app)) if c not in COMMANDS_WITHOUT_A_JOB}
    assert [c for c in sorted(wanted) if not any(c == w or c.startswith(w + " ") for w in words)] == []
    assert [w for w in words if not any(c == w or c.startswith(w + " ") for c in wanted)] == []
