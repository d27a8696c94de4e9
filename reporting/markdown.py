"""Markdown from numbers and names, and a self-contained HTML page from Markdown.

Names of models, hooks and data sets come from users and files, so `plain` escapes them. The page is made without raw HTML,
and its Content-Security-Policy allows its own style and pictures only.
"""

import base64
import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

NOTHING = "–"  # a missing figure
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
_SPECIAL = re.compile(r"[\\`*|<>&\[\]~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def plain(name: object) -> str:
    """Escape a name as one line of Markdown text, also for table cells."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", line).replace("://", "\\://")  # no links from addresses


def number(value: Any, digits: int = 4) -> str:
    """Format a figure: `digits` decimals below 10, as many significant digits above, integers in full, None as a dash."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 10:
        return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0 into 0
    decimals = max(0, digits - len(str(int(abs(value)))))
    return f"{value:,.{decimals}f}"


def table(headings: Sequence[str], lines: Iterable[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """A Markdown table of Markdown cells; the columns `words` are aligned left, the others right."""
    align = [":--" if i in words else "--:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, align, *lines))


def html(markdown: str, folder: Path, title: str) -> str:
    """Convert Markdown to an HTML page that includes its pictures, PNG files by their paths in `folder`."""
    md = MarkdownIt("commonmark", {"html": False}).enable("table")
    md.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    md.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = md.parse(markdown)
    for index, token in enumerate(tokens):
        if token.attrGet("style") == "text-align:right":  # the policy forbids styles on elements
            token.attrs = {"class": "number"}
        elif "style" in token.attrs:
            token.attrs = {}
        if token.type == "heading_open":
            token.attrSet("id", anchor(tokens[index + 1].content))
        for child in token.children or ():
            if child.type == "image":
                data = base64.b64encode((folder / str(child.attrs["src"])).read_bytes()).decode()
                child.attrs["src"] = f"data:image/png;base64,{data}"
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{md.renderer.render(tokens, md.options, {})}</main>\n</body>\n</html>\n"
    )


def anchor(heading: str) -> str:
    """The anchor of a heading, here and on sites that render Markdown."""
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))
