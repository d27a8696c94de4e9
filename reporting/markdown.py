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
from markdown_it.token import Token

NOTHING = "–"  # a missing figure
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
                _inline(child, folder)
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


def _inline(image: Token, folder: Path) -> None:
    data = base64.b64encode((folder / str(image.attrs["src"])).read_bytes()).decode()
    image.attrs["src"] = f"data:image/png;base64,{data}"


STYLE = """
:root { --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8; --paper: #fff; --tint: #f6f8fa; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b0; --line: #333a43; --paper: #15181c; --tint: #1d2126; --accent: #6cb8e6; }
  img { filter: brightness(.92); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-weight: 650; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; font-weight: 650; color: var(--soft); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
li::marker { color: var(--accent); }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
code { font: .9em ui-monospace, monospace; }
#what-to-know-first { border-top: 2px solid var(--accent); }
#what-to-know-first + p, #what-to-know-first + ul {
  background: var(--tint); border-radius: .5rem; margin: 0; max-width: none;
}
#what-to-know-first + p { padding: .8rem 1.1rem; }
#what-to-know-first + ul { padding: .7rem 1.1rem .7rem 2.2rem; }
.wide { overflow-x: auto; margin: .75rem 0 1.25rem; }
.wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; }
th, td { padding: .32rem .65rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom-color: var(--soft); vertical-align: bottom; }
td:first-child, th:first-child { padding-left: 0; position: sticky; left: 0; background: var(--paper); }
tbody tr:hover, tbody tr:hover td:first-child { background: var(--tint); }
td em { display: block; font-size: .8em; font-style: normal; color: var(--soft); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; max-width: 36rem; height: auto; padding: .4rem; background: #fff; border-radius: .5rem; }
p:has(> img + img) { display: grid; gap: 1rem; max-width: none; }
p:has(> img + img) { grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
@media (max-width: 40rem) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.35rem; }
  td:first-child { min-width: 5.5rem; max-width: 40vw; white-space: normal; overflow-wrap: break-word; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tint: #fff; --accent: #004d7a; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  h2 { margin-top: 1.5rem; }
  tr, img { break-inside: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .4rem; }
  img { filter: none; max-width: 30rem; }
}
"""
