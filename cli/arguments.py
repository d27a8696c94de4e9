"""Typer classes whose commands check their arguments before they run. A mistake is one line that names the option."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..engine.errors import UserError, near, shown
from ..engine.setting_types import check_text, kinds
from ..engine.storage.path_names import expand_path

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_WHOLE = re.compile(r"[-+]?[0-9]{1,4000}", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|inf|nan)", re.ASCII)


class App(typer.Typer):
    """A Typer app made of `Group` and `Command`."""

    def __init__(self, **options: Any):
        super().__init__(cls=Group, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=Command, **options)


class Checked:
    """Checks text and numbers as typed, and expands `~` in paths."""

    callback: Callable[..., Any] | None

    @cached_property
    def annotations(self) -> dict[str, Any]:
        parameters = inspect.signature(self.callback or id).parameters
        return {name: parameter.annotation for name, parameter in parameters.items()}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        command: Any = self
        with _one_line(command, ctx):
            typed, _, _ = command.make_parser(ctx).parse_args(args=list(args))
            if not {"--help", "-h"} & set(args):
                for param in command.get_params(ctx):
                    typed_value = typed.get(param.name)
                    for text in typed_value if isinstance(typed_value, list | tuple) else [typed_value]:
                        if isinstance(text, str):
                            _check(_label(param), text, self.annotations.get(str(param.name)))
            rest = super().parse_args(ctx, args)  # type: ignore[misc]
        for param in command.get_params(ctx):
            name, value = str(param.name), ctx.params.get(str(param.name))
            if "Path" in str(self.annotations.get(name)) and isinstance(value, str | Path):
                ctx.params[name] = type(value)(expand_path(value, _label(param)))
        return rest


class Command(Checked, TyperCommand):
    """A command."""


class Group(Checked, TyperGroup):
    """Commands, listed in `--help` under the heading of their `rich_help_panel`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        width = max(map(len, names))
        rows_by_heading: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            command: Any = self.get_command(ctx, name)
            summary = command.get_short_help_str(formatter.width - 6 - width)
            heading = command.rich_help_panel or "Commands"
            rows_by_heading.setdefault(heading, []).append((name.ljust(width), summary))
        for heading, rows in rows_by_heading.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            suggestion = near(args[0], names, len(names))
            raise UserError(f"{shown(args[0])}: no such command in {ctx.command_path}; {suggestion}")
        with _one_line(self, ctx):
            return super().resolve_command(ctx, args)


def _check(label: str, text: str, annotation: Any) -> None:
    types = kinds(annotation)
    try:
        if not types & {int, float}:
            check_text(label, text)
            return
    except ValueError as error:
        raise UserError(error) from None
    if not (_WHOLE if int in types else _NUMBER).fullmatch(text):
        allowed = "a whole number, in the digits 0 to 9" if int in types else "a number, in the digits 0 to 9"
        raise UserError(f"{label}: {shown(text)} is not allowed; it must be {allowed}")
    value = int(text) if int in types and len(text) <= 300 else float(text)
    if math.isinf(value):
        raise UserError(f"{label}: {shown(text)} is not allowed; it must be a finite number")
    for option in getattr(annotation, "__metadata__", ()):
        least, most = getattr(option, "min", None), getattr(option, "max", None)
        if not ((least is None or value >= least) and (most is None or value <= most)):
            bounds = [f"at {word} {bound:,}" for word, bound in (("least", least), ("most", most)) if bound is not None]
            raise UserError(f"{label}: {shown(text)[1:-1]} is not allowed; it must be {' and '.join(bounds)}")


def _label(param: Any) -> str:
    """The name of an option (--n) or of an argument (as in the usage line)."""
    return next((name for name in param.opts if name.startswith("--")), param.metavar or str(param.name).upper())


@contextmanager
def _one_line(command: Any, ctx: Any) -> Iterator[None]:
    """Turn Typer's usage errors, which take several lines, into a UserError."""
    try:
        yield
    except UsageError as raised:
        error: Any = raised
        kind, message = type(error).__name__, " ".join(error.format_message().split()).rstrip(".")
        if kind == "NoArgsIsHelpError":
            raise
        options = [name for param in command.get_params(ctx) for name in param.opts if name.startswith("-")]
        param = getattr(error, "param", None)
        if kind == "NoSuchOption":
            message = f"{shown(error.option_name)[1:-1]}: no such option; {near(error.option_name, options)}"
        elif kind == "MissingParameter" and param is not None:
            message = f"{_label(param)}: missing; it must be given"
        elif param is not None:
            message = f"{_label(param)}: {error.message}"
        elif kind == "BadOptionUsage":
            message = f"{shown(error.option_name)[1:-1]}: {message}"
        raise UserError(f"{message}; see {ctx.command_path} --help") from None
