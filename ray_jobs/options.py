"""A job's Config model as a command line: one option a field, its help the field's docstring.

    app.command("caption")(command(Config, run, finish=print_summary, arguments=["shards"]))

Every command made here also takes `--config FILE.yaml` and `--json`. A value comes from the option where it is given,
else from the file, else from the model's default, and the model validates the whole: YAML, options and Python agree.

Importing this file loads neither Ray nor torch.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

CONFIG_HELP = "YAML file with any of these settings by their names (underscores); options win over it."


def command(
    config: type[BaseModel],
    run: Callable[[Any], Any],
    *,
    finish: Callable[[Any, bool], None],
    arguments: Sequence[str] = (),
    flags: dict[str, str] | None = None,
) -> Callable[..., None]:
    """A function for `typer.Typer.command` that builds `config` from its options and hands it to `run`.

    Args:
        config: a pydantic model; `use_attribute_docstrings=True` gives the options their help.
        run: called with the built config; returns a summary.
        finish: called with the summary, and whether `--json` was given.
        arguments: fields that are positional arguments, in their order.
        flags: short option names by field, such as {"out": "-o"}.
    """
    given = flags or {}
    order = [*arguments, *(name for name in config.model_fields if name not in arguments)]
    parameters = [_parameter(name, config.model_fields[name], name in arguments, given.get(name)) for name in order]
    parameters += [
        _keyword("config_file", Path | None, None, typer.Option("--config", metavar="FILE", help=CONFIG_HELP)),
        _keyword("as_json", bool, False, typer.Option("--json", help="Print the summary as JSON on stdout.")),
    ]

    def call(config_file: Path | None, as_json: bool, **options: Any) -> None:
        finish(run(build(config, options, config_file, arguments=arguments)), as_json)

    call.build = functools.partial(build, config, arguments=arguments)  # type: ignore[attr-defined]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def build(
    config: type[BaseModel],
    options: Mapping[str, Any],
    config_file: Path | None = None,
    base: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> Any:
    """The config from options, then a YAML file, then `base`; options that are None or empty are not given.

    Raises ValueError, a line for each thing that is wrong.
    """
    values = {**(base or {}), **(read_yaml(config_file) if config_file else {})}
    for name, value in options.items():
        if value is not None and value != []:
            values[name] = _parsed(config.model_fields[name].annotation, value)
    try:
        return config.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(config, e, arguments) for e in error.errors())) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds settings by name. Raises ValueError where it is something else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines")
    return {str(k): v for k, v in values.items()}


def _parameter(name: str, field: FieldInfo, positional: bool, short: str | None) -> inspect.Parameter:
    """Every option defaults to None, which means "not given": the model knows the defaults."""
    annotation, metavar = _option_type(field.annotation)
    hint: Any
    if positional:
        hint = typer.Argument(help=field.description, metavar=metavar or name.upper(), show_default=False)
    else:
        names = [n for n in (_option_name(name, annotation, on=field.default is True), short) if n]
        hint = typer.Option(*names, help=f"{field.description or ''}{_default(field)}", metavar=metavar)
    return _keyword(name, annotation | None, None, hint)


def _keyword(name: str, kind: Any, default: Any, hint: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, hint])


def _option_name(name: str, annotation: Any, on: bool = False) -> str:
    """`--num-samples`, `--dry-run`, `--fast/--no-fast` where that is on; of a list the singular, as in `--prompt`."""
    flag = "--" + name.replace("_", "-")
    if get_origin(annotation) is list:
        return flag.removesuffix("s")
    return f"{flag}/--no-{flag[2:]}" if annotation is bool and on else flag


def _option_type(annotation: Any) -> tuple[Any, str | None]:
    """(type for typer, metavar) of a field's type."""
    annotation = _without_none(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal or annotation in (str, int, float, bool, Path):
        return annotation, None
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return annotation, None
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        if get_origin(args[0]) is Literal:  # typer has no list of choices; the model checks them
            return list[str], "|".join(str(a) for a in get_args(args[0]))
        return list[_option_type(args[0])[0]], None  # type: ignore[misc]
    if origin is tuple:
        return str, ",".join("N" for _ in args)
    return str, "YAML"


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (types.UnionType, Union):
        kinds = [a for a in get_args(annotation) if a is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation


def _parsed(annotation: Any, value: Any) -> Any:
    """An option's text as the model takes it: `1,2,3` for a fixed tuple, YAML for what has no flat form."""
    annotation = _without_none(annotation)
    if not isinstance(value, str) or _option_type(annotation)[1] is None:
        return value
    if get_origin(annotation) is tuple:
        return [part.strip() for part in value.split(",")]
    return yaml.safe_load(value)


def _default(field: FieldInfo) -> str:
    """What stands after an option's help: its default, where it has one worth showing."""
    if field.is_required():
        return " Required."
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, bool) or default in ("", (), [], {}):
        return ""
    if isinstance(default, tuple | list):
        default = ",".join(str(v) for v in default)
    return f" [default: {default.value if isinstance(default, Enum) else default}]"


def _sentence(config: type[BaseModel], error: Any, arguments: Sequence[str]) -> str:
    """One validation error as a sentence that names the option."""
    name = str(error["loc"][0]) if error["loc"] else ""
    field = config.model_fields.get(name)
    kind, metavar = _option_type(field.annotation) if field else (str, None)
    option = name.upper() if name in arguments else _option_name(name, kind)
    if len(error["loc"]) > 1 and metavar and kind is str and metavar != "YAML":
        return f"{option} takes {metavar}: {metavar.count('N')} numbers with commas between them"
    if error["type"] == "missing":
        return f"{option} is missing: {(field and field.description) or 'it has no default'}"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, config.model_fields, n=1)
        return f"there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{option}: {message}" if name else message
