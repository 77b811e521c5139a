"""The meddam command as a user meets it: help, sentences instead of tracebacks, exit codes, JSON on stdout."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from meddam_core.storage import BucketError
from ray_jobs import caption, caption_config, cli, demo, describe, report
from ray_jobs.ingest_config import SOURCES
from ray_jobs.summary import Summary

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests/data/oracle/dam_tiny"
MODEL = str(ORACLE / "checkpoint")


def meddam(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """A photograph with a bright square, and beside it `mask.png` and `small.png`."""
    image = np.random.default_rng(0).integers(0, 90, (80, 120, 3), np.uint8)
    image[20:50, 30:70] += 120
    PILImage.fromarray(image).save(tmp_path / "photo.png")
    mask = np.zeros((80, 120), np.uint8)
    mask[20:50, 30:70] = 255
    PILImage.fromarray(mask).save(tmp_path / "mask.png")
    PILImage.fromarray(mask[:40]).save(tmp_path / "small.png")
    return str(tmp_path / "photo.png")


JOBS = [
    (["caption"], caption_config.Config),
    (["describe"], describe.Config),
    (["report"], report.Config),
    (["demo"], demo.Config),
]
JOBS += [(["ingest", name], config) for name, (config, _) in SOURCES.items()]


@pytest.mark.parametrize(("command", "config"), JOBS, ids=[" ".join(c) for c, _ in JOBS])
def test_every_setting_has_an_option_with_help(
    command: list[str], config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = meddam(capsys, *command, "--help")
    assert code == 0
    for name, field in config.model_fields.items():
        assert field.description, f"{name} has no docstring"
        assert re.search(rf"--{name.replace('_', '-').removesuffix('s')}|{name.upper()}", out), name


def test_help_lists_the_commands_in_the_order_of_their_use(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = meddam(capsys, "--help")
    commands = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()]
    assert code == 0
    assert commands.index("ingest") < commands.index("caption") < commands.index("retry") < commands.index("report")
    assert "not for diagnosis" in " ".join(out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert meddam(capsys, "--version")[:2] == (0, "meddam 0.1.0\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["caption"], "SHARDS is missing"),
        (["caption", "nowhere", "--out", "{tmp}/run", "--model", MODEL], "there are no image shards"),
        (["caption", "x", "--out", "{tmp}/run", "--model", "{tmp}"], "no checkpoint|config.json"),
        (["caption", "x", "--out", "{tmp}/run", "--model", MODEL, "--num-samples", "0"], "--num-samples"),
        (["caption", "x", "--out", "{tmp}/run", "--model", MODEL, "--prompt", "nope"], "no prompt 'nope'"),
        (["caption", "x", "--out", "gs://b/run", "--model", MODEL], "use s3://BUCKET/PREFIX or a path"),
        (["describe", "{tmp}/none.png", "--box", "1,2,3,4", "--model", MODEL], "none.png"),
        (["describe", "{tmp}", "--box", "1,2,3,4", "--model", MODEL], "is a directory"),
        (["describe", "x.png", "--model", MODEL], "--box x0,y0,x1,y1 or --mask"),
        (["describe", "x.png", "--box", "1,2,3", "--model", MODEL], "4 numbers"),
        (["audit", "{tmp}"], "is not a run directory"),
        (["report", "{tmp}"], "is not a run directory"),
        (["retry", "{tmp}"], "is not a run directory"),
        (["verify", "--oracle", "{tmp}"], "cases"),
        (["caption", "--no-such-option"], "No such option"),
        (["frobnicate"], "No such command"),
        (["ingest", "manifest", "{tmp}/none.jsonl", "--out", "{tmp}/set"], "none.jsonl"),
        (["ingest", "phantoms", "--out", "{tmp}/set", "--recipe", "nope"], "there is no recipe 'nope'"),
        (["ingest", "phantoms", "--out", "{tmp}/set", "--kind", "spine"], "--kind"),
        (["ingest", "nowhere", "--out", "{tmp}/set"], "No such command"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence_and_exit_code_2(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = meddam(capsys, *(a.format(tmp=tmp_path) for a in args))
    assert code == 2
    assert out == ""
    assert re.search(said, err)
    assert "Traceback" not in err


def test_a_retry_has_gpus_and_cpus_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three images that failed on thirty-two GPUs do not wait for thirty-two GPUs."""
    of_the_run = {"num_captioners": 32, "wait_for_gpus": 32, "wait_for_gpus_s": 9e9, "num_cpus": 512}
    begun = caption_config.Config(shards=("a",), out="b", model="c", images_per_batch=3, **of_the_run)  # type: ignore[arg-type]
    (tmp_path / "run.json").write_text(json.dumps({"config": begun.model_dump(mode="json")}))
    done = Summary(state="complete", attempt=2, num_images=3, num_regions=3, engine="e", kernels="k")
    seen: list[caption_config.Config] = []
    monkeypatch.setattr(caption, "run", lambda cfg, retry: seen.append(cfg) or done)
    (tmp_path / "changed.yaml").write_text("slots: 5\nnum_cpus: 8\n")
    given = ["--num-captioners", "2", "--wait-for-gpus", "1", "--wait-for-gpus-s", "60", "--num-cpus", "4"]
    given += ["--config", str(tmp_path / "changed.yaml")]
    for options in ([], given):
        assert meddam(capsys, "retry", str(tmp_path), *options)[0] == 0
    here = {"out": str(tmp_path)}
    default = {name: caption_config.Config.model_fields[name].default for name in of_the_run}
    assert seen[0] == begun.model_copy(update=here | default)
    own = {"num_captioners": 2, "wait_for_gpus": 1, "wait_for_gpus_s": 60.0, "num_cpus": 4, "slots": 5}
    assert seen[1] == begun.model_copy(update=here | own)
    (tmp_path / "changed.yaml").write_text("slot: 5\n")
    code, _, err = meddam(capsys, "retry", str(tmp_path), "--config", str(tmp_path / "changed.yaml"))
    assert code == 2 and "there is no setting 'slot'; did you mean 'slots'?" in err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        cli.main(["--debug", "audit", str(tmp_path)])


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_a_sentence(s3_bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = meddam(capsys, "caption", "s3://nowhere-at-all/x", "--out", f"{s3_bucket}/run", "--model", MODEL)
    assert code == 2
    assert "s3://nowhere-at-all/x" in err
    assert "does not exist" in err


def test_a_bucket_that_takes_no_object_is_a_sentence() -> None:
    assert cli._sentence(BucketError("s3://b/a: access was refused")) == "s3://b/a: access was refused"


def test_describe_by_box_and_by_mask(picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--model", MODEL, "--max-new-tokens", "8", "--recipe", "generic"]
    code, out, _ = meddam(capsys, "describe", picture, "--box", "30,20,70,50", "--json", *short)
    by_box = json.loads(out)
    assert code == 0
    assert by_box["text"]
    assert (by_box["box"], by_box["num_tokens"], by_box["prompt_id"]) == ([30, 20, 70, 50], 8, "meddam-v1")
    mask = str(Path(picture).with_name("mask.png"))
    code, out, _ = meddam(capsys, "describe", picture, "--mask", mask, *short)
    assert (code, out) == (0, by_box["text"] + "\n")  # a mask that fills its box is the same region


@pytest.mark.parametrize(
    ("region", "said"),
    [
        (["--box", "500,500,600,600"], "box_outside"),
        (["--box", "50,50,50,60"], "box_empty"),
        (["--mask", "small.png"], "mask_size"),
        (["--mask", "photo.png", "--box", "1,2,3,4"], "give either"),
    ],
)
def test_a_region_that_cannot_be_is_said(
    region: list[str], said: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    region = [str(Path(picture).with_name(r)) if r.endswith(".png") else r for r in region]
    code, _, err = meddam(capsys, "describe", picture, *region, "--model", MODEL)
    assert code == 2
    assert said in err


def test_verify_passes_on_the_oracle_and_fails_on_a_changed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = "c2_tiny_blob_60x40.npz"
    (tmp_path / "cases").mkdir()
    arrays = dict(np.load(ORACLE / "cases" / case, allow_pickle=False))
    np.savez(tmp_path / "cases" / case, **arrays)
    code, out, _ = meddam(capsys, "verify", "--checkpoint", MODEL, "--oracle", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["passed"] is True
    arrays["prefill_logits"] = arrays["prefill_logits"] + np.float32(0.01)
    np.savez(tmp_path / "cases" / case, **arrays)
    code, out, _ = meddam(capsys, "verify", "--checkpoint", MODEL, "--oracle", str(tmp_path))
    assert code == cli.EXIT_DIFFERENT
    assert "prefill_logits" in out


def test_control_c_says_how_to_go_on() -> None:
    code = (
        "import os, signal; from ray_jobs import cli, audit\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells start what is in the background without
        "audit.audit = lambda run: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main(['audit', 'x'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 128 + signal.SIGINT
    assert "run the same command again" in done.stderr
