"""The `meddam` command: every job and tool of the project, one sub-command each.

    meddam ingest phantoms s3://bucket/phantoms
    meddam caption s3://bucket/phantoms --out s3://bucket/runs/one --model /weights/DAM-3B
    meddam report s3://bucket/runs/one

Options are the fields of each job's Config (ray_jobs.options). Exit codes are those of ray_jobs.summary; what a user
can mend is one line on stderr and exit code 2, with a traceback only under --debug.

Importing this file, and so every `--help`, loads neither Ray nor torch.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel

from meddam_core import __version__
from meddam_core.storage import BucketError, explain
from ray_jobs import (
    adjudicate,
    audit,
    benchmark,
    caption,
    caption_config,
    captions_import,
    check_claims,
    check_grounding,
    check_judges,
    check_pairs,
    compact,
    cost,
    curate,
    demo,
    describe,
    dlc_bench,
    doctor,
    export,
    fetch_weights,
    finetune,
    finetune_config,
    grounded,
    ingest,
    judge,
    judge_config,
    leaderboard,
    loop,
    loop_config,
    migrate,
    prefer,
    qa,
    report,
    retry,
    sbom,
    shorten,
    stage_profile,
    status,
    withdraw,
)
from ray_jobs.ingest_sources import SOURCES
from ray_jobs.lease import LeaseHeld
from ray_jobs.options import command
from ray_jobs.process_end import run_and_end
from ray_jobs.run_directory import RunDirectory
from ray_jobs.serve import config as serve_config
from ray_jobs.serve import job as serve
from ray_jobs.session import TooFewGpus
from ray_jobs.summary import EXIT_CONFIG, EXIT_HELD, EXIT_INCOMPLETE

EXIT_DIFFERENT = 1
"""`meddam verify` found a stage that differs."""
EXIT_INTERRUPTED = 130


class _InOrderOfUse(typer.core.TyperGroup):
    """typer lists groups last; ingest comes first."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "ingest")


app = typer.Typer(
    name="meddam",
    cls=_InOrderOfUse,
    help="Region captions for medical images by the million. A research tool: not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What typer raises for options that don't exist; it carries its own copy of click, which names it nowhere else."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meddam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # read by main
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the result.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for name in ("botocore", "boto3", "urllib3", "matplotlib", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _job(
    name: str, config: type[BaseModel], run: Callable[[Any], Any], arguments: Sequence[str], flags: dict[str, str],
    about: str, group: typer.Typer = app,
) -> None:  # fmt: skip
    """Registers a job: its Config as options, its summary on stdout, its exit code."""
    group.command(name, help=about)(command(config, run, finish=_finish, arguments=arguments, flags=flags))


def _finish(summary: Any, as_json: bool) -> None:
    typer.echo(summary.model_dump_json(indent=2) if as_json else "\n".join(summary.lines()))
    raise typer.Exit(summary.exit_code)


_ingest = typer.Typer(help="Turn a dataset into image shards: de-identified pixels and regions.", no_args_is_help=True)
app.add_typer(_ingest, name="ingest")
for _name, (_config, _arguments) in SOURCES.items():
    _job(_name, _config, ingest.run, _arguments, {"out": "-o"}, inspect.getdoc(_config) or "", _ingest)

_job(
    "caption", caption_config.Config, caption.run, ["shards"], {"out": "-o", "model": "-m"},
    "Describe every region of every image in SHARDS. Run the same command again to resume.",
)  # fmt: skip


_job("retry", retry.Config, retry.run, ["run"], {}, inspect.getdoc(retry.Config) or "")


@app.command("audit")
def _audit(
    run: Annotated[str, typer.Argument(help="The run directory, on S3 or disk.", show_default=False)],
    as_json: JsonFlag = False,
) -> None:
    """Compare captions with input: missing, duplicated, failed."""
    found = audit.audit(RunDirectory(run))
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else _audit_text(found))
    raise typer.Exit(0 if found.clean else EXIT_INCOMPLETE)


def _audit_text(found: audit.Audit) -> str:
    state = "clean" if found.clean else "not clean" if found.published else "not published yet"
    lines = [f"{state}: {found.num_images:,} images, {found.num_regions:,} regions"]
    for name in ("expected", "published", "missing", "duplicated", "unexpected"):
        lines.append(f"  {getattr(found, 'num_' + name):>10,}  {name}")
    lines += [f"  {count:>10,}  {status}" for status, count in sorted(found.by_status.items())]
    lines += [f"  {count:>10,}    {reason}" for reason, count in sorted(found.by_reason.items())]
    return "\n".join(lines)


_qa = typer.Typer(help="Attribute questions: the library, and the question table of a dataset.", no_args_is_help=True)
app.add_typer(_qa, name="qa")
_Library = Annotated[Path | None, typer.Option("--library", help="Folder of own templates, added to the shipped ones.")]


@_qa.command("lint")
def _qa_lint(library: _Library = None) -> None:
    """Look for faults in the question library."""
    from qa_library import lint, load_library

    loaded = load_library(library)
    problems = lint(loaded)
    typer.echo("\n".join(problems) or f"no fault in {len(loaded.sets)} template sets, library {loaded.version}")
    raise typer.Exit(EXIT_DIFFERENT if problems else 0)


@_qa.command("show")
def _qa_show(
    template_set: Annotated[str | None, typer.Argument(help="A template set; none lists them.")] = None,
    attribute: Annotated[str | None, typer.Argument(help="One of its attributes.")] = None,
    library: _Library = None,
) -> None:
    """Show what is asked, and by which words an answer is recognised."""
    from qa_library import load_library
    from qa_library.show import show

    typer.echo(show(load_library(library), template_set, attribute))


_job("build", qa.Config, qa.run, ["shards"], {"out": "-o"}, inspect.getdoc(qa.Config) or "", _qa)

_captions = typer.Typer(help="Captions of other systems.", no_args_is_help=True)
app.add_typer(_captions, name="captions")
_job("import", captions_import.Config, captions_import.run, ["table"], {"out": "-o", "model": "-m"},
     inspect.getdoc(captions_import.Config) or "", _captions)  # fmt: skip
_job("list", captions_import.ListConfig, captions_import.list_regions, ["shards"], {"out": "-o"},
     inspect.getdoc(captions_import.ListConfig) or "", _captions)  # fmt: skip

_job(
    "curate", curate.Config, curate.run, ["runs"], {"out": "-o"},
    "Choose training data from the captions of RUNS; every caption dropped says why.",
)  # fmt: skip
_job(
    "prefer", prefer.Config, prefer.run, ["run"], {"model": "-m"},
    "Have a judge choose the best of each region's samples, two at a time in both orders, for `meddam curate`.",
)  # fmt: skip
_job(
    "shorten", shorten.Config, shorten.run, ["source"], {"out": "-o", "model": "-m"},
    "Add shorter forms of its captions to a curated set, by rule or by a language model whose words are checked.",
)  # fmt: skip
_job(
    "export", export.Config, export.run, ["source"], {"out": "-o", "format": "-f"},
    "Write a curated set or a run in a format that others read; stops where a licence would be broken.",
)  # fmt: skip
_job(
    "finetune", finetune_config.Config, finetune.run, ["shards"], {"out": "-o", "model": "-m"},
    "Train a DAM on SHARDS and their captions. Run the same command again to resume.",
)  # fmt: skip
_job(
    "loop", loop_config.Config, loop.run, [], {"out": "-o", "model": "-m"},
    "Caption, judge, curate, finetune and benchmark, round after round. Run the same command again to resume.",
)  # fmt: skip
_dlc_bench = typer.Typer(help="DLC-Bench, the public benchmark, by its own rules.", no_args_is_help=True)
app.add_typer(_dlc_bench, name="dlc-bench")
_job("score", dlc_bench.ScoreConfig, dlc_bench.score, [], {},
     inspect.getdoc(dlc_bench.ScoreConfig) or "", _dlc_bench)  # fmt: skip
_job("run", dlc_bench.RunConfig, dlc_bench.run, [], {}, inspect.getdoc(dlc_bench.RunConfig) or "", _dlc_bench)
_job("verify", dlc_bench.VerifyConfig, dlc_bench.verify_checkpoint, [], {},
     inspect.getdoc(dlc_bench.VerifyConfig) or "", _dlc_bench)  # fmt: skip

_job(
    "judge", judge_config.Config, judge.run, ["run"], {"questions": "-q"},
    "Judge the captions of RUN by a question table, and score them. Run the same command again to resume.",
)  # fmt: skip
_job(
    "report", report.Config, report.run, ["run"], {"out": "-o"},
    "Write the HTML report of a finished run, or the page of a dataset.",
)  # fmt: skip
_job(
    "leaderboard", leaderboard.Config, leaderboard.run, ["runs"], {"out": "-o"},
    "Compare judged runs: scores with intervals, paired tests, controls; a page, a CSV and YAML.",
)  # fmt: skip
_job("doctor", doctor.Config, doctor.run, [], {}, "Look whether this cluster and this bucket are fit for a run.")
_job(
    "withdraw", withdraw.Config, withdraw.run, ["places"], {},
    "Take a patient's rows out of datasets, runs and exports, and record that it was done.",
)  # fmt: skip
_job(
    "compact", compact.Config, compact.run, ["place"], {"out": "-o"},
    "Merge small files: a run's captions into a further generation, or shards into another place.",
)  # fmt: skip
_job(
    "migrate", migrate.Config, migrate.run, ["place"], {"out": "-o"},
    "Write shards or captions of an older schema version anew. Readers upgrade them anyway.",
)  # fmt: skip
_job(
    "profile", stage_profile.Config, stage_profile.run, ["shards"], {"model": "-m"},
    "Measure where the time of preparing and describing goes, on a few rows.",
)  # fmt: skip
_job(
    "plan", cost.Config, cost.run, ["shards"], {},
    "Say what a run will take in hours and money, from measured rates and a table of prices.",
)  # fmt: skip
_job(
    "fetch-weights", fetch_weights.Config, fetch_weights.run, ["source", "target"], {},
    "Copy a checkpoint folder from a bucket to this machine, whole or not at all.",
)  # fmt: skip
_job("sbom", sbom.Config, sbom.run, [], {"out": "-o"}, "List what is installed here, as a CycloneDX bill of materials.")
_job("status", status.Config, status.run, ["run"], {}, "Say where a run stands, from its run directory alone.")
_job(
    "benchmark", benchmark.Config, benchmark.run, [], {"out": "-o"},
    "Caption, judge and rank models x datasets x prompts x views: --config GRID.yaml. Run it again to resume.",
)  # fmt: skip
_job("grounded", grounded.Config, grounded.run, ["run"], {"out": "-o"}, grounded.Config.__doc__ or "")
_check = typer.Typer(help="Checks of captions and models that need no judge.", no_args_is_help=True)
app.add_typer(_check, name="check")
_job("claims", check_claims.Config, check_claims.run, ["run"], {"out": "-o"}, check_claims.Config.__doc__ or "", _check)
_job(
    "pairs", check_pairs.Config, check_pairs.run, ["shards"], {"out": "-o", "model": "-m"},
    check_pairs.Config.__doc__ or "", _check,
)  # fmt: skip
_job(
    "variants", check_grounding.VariantsConfig, check_grounding.make_variants, ["shards"], {"out": "-o"},
    check_grounding.VariantsConfig.__doc__ or "", _check,
)  # fmt: skip
_job(
    "grounding", check_grounding.Config, check_grounding.run, ["run"], {"out": "-o"},
    check_grounding.Config.__doc__ or "", _check,
)  # fmt: skip
_job("judges", check_judges.Config, check_judges.run, ["run"], {"out": "-o"}, check_judges.Config.__doc__ or "", _check)
_adjudicate = typer.Typer(help="Have two clinicians check a judge, blind.", no_args_is_help=True)
app.add_typer(_adjudicate, name="adjudicate")
_job(
    "sheets", adjudicate.SheetsConfig, adjudicate.write_sheets, ["run"], {"out": "-o"},
    adjudicate.SheetsConfig.__doc__ or "", _adjudicate,
)  # fmt: skip
_job(
    "score", adjudicate.ScoreConfig, adjudicate.score, ["sheets"], {}, adjudicate.ScoreConfig.__doc__ or "",
    _adjudicate,
)  # fmt: skip
_job("describe", describe.Config, describe.run, ["image"], {"model": "-m"}, "Describe one region of one image.")


@app.command("verify")
def _verify(
    oracle: Annotated[Path, typer.Option(help="Oracle folder: saved activations of the reference.")],
    checkpoint: Annotated[Path | None, typer.Option(help="DAM checkpoint folder; by default the oracle's own.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare a DAM with the reference, stage by stage."""
    from meddam_core.dam.verify import render_text, verify

    found = verify(checkpoint, oracle)
    typer.echo(found.to_json() if as_json else render_text(found))
    raise typer.Exit(0 if found.passed else EXIT_DIFFERENT)


_job(
    "serve", serve_config.Config, serve.run, [], {"model": "-m"},
    "Serve captions over HTTP (OpenAI-compatible), with a page to draw a region on.",
)  # fmt: skip

_job(
    "demo", demo.Config, demo.run, [], {"model": "-m"}, "Show all of it on this machine, with an S3 server on loopback."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line, and raises SystemExit with its exit code; without `argv`, ends the process with it."""
    if argv is None:
        run_and_end(lambda: _run(sys.argv[1:]))
    _run(list(argv))


def _run(args: list[str]) -> NoReturn:
    """The one place where errors become sentences."""
    try:
        code = app(args, prog_name="meddam", standalone_mode=False)
    except _UsageError as error:
        error.show()
        sys.exit(EXIT_CONFIG)
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except (LeaseHeld, TooFewGpus) as error:
        _end(EXIT_HELD if isinstance(error, LeaseHeld) else EXIT_INCOMPLETE, str(error))
    except (ValueError, OSError) as error:
        line = _sentence(error)
        if line is None or "--debug" in args:
            raise
        _end(EXIT_CONFIG, line)
    if code == EXIT_INTERRUPTED:
        _end(EXIT_INTERRUPTED, "stopped; run the same command again to go on")
    sys.exit(code or 0)


def _sentence(error: ValueError | OSError) -> str | None:
    """What the user can mend; None for errors that only a traceback explains."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, BucketError):
        return str(getattr(error, "cause", error))  # out of a Ray task it is wrapped
    if "AWS Error" in str(error):  # pyarrow's own, from a place that expected the bucket to be there
        return explain("the bucket", error)
    text = str(error)
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError) or "is a directory" in text.lower():
        return text.rpartition("Errno")[2].partition("]")[2].partition(". Detail")[0].strip() or text
    return None


def _end(code: int, line: str) -> NoReturn:
    typer.echo(f"meddam: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
