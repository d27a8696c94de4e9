"""Print docs/reference/cli.md: every command and option, as Typer's own `utils docs` lists them, in whole sentences."""

import re
from functools import partialmethod

import typer
from temposae.cli import app
from typer import _click
from typer.cli import get_docs_for_click

#: Typer cuts summaries to 45 characters
_click.Command.get_short_help_str = partialmethod(_click.Command.get_short_help_str, limit=200)
command = typer.main.get_command(app)
context = typer.Context(command, info_name="temposae")
page = get_docs_for_click(obj=command, ctx=context, name="temposae", title="Command line")
# names in aligned columns, which --help shows as they are, become a list
print(re.sub(r"^(\w+(?:, \w+)*) {2,}(?=\S)", r"* `\1`: ", page, flags=re.M).strip())
