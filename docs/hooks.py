"""What `mkdocs build` needs beside the pages in docs/: the root's own pages, the examples, and the sources for the
reference."""

import json
import re
import shutil
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "build" / "docs-sources"
EXAMPLES = ROOT / "examples"
#: pages of the repository's root that the site shows too
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config: MkDocsConfig) -> None:
    """Copy the modules to a folder named `temposae`: mkdocstrings finds them there, whatever the clone is called."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    for package in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]:
        folder = Path(*package.split(".")[1:])
        (SOURCES / "temposae" / folder).mkdir(parents=True)
        for module in (ROOT / folder).glob("*.py"):
            shutil.copy(module, SOURCES / "temposae" / folder)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    pages = {notebook.stem: notebook_page(notebook) for notebook in sorted(EXAMPLES.glob("*.ipynb"))}
    pages["scripts"] = scripts_page()
    for name, text in pages.items():
        files.append(File.generated(config, f"examples/{name}.md", content=text))
    return files


def notebook_page(notebook: Path) -> str:
    """An executed notebook as Markdown: its text, code, printed lines and figures."""
    blocks = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                blocks.append(f"![Figure](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif printed := "".join(output.get("text", data.get("text/plain", ""))):
                blocks.append(f"```text\n{printed.rstrip()}\n```")
    title, *rest = blocks
    return "\n\n".join([title, f"The executed notebook `examples/{notebook.name}`.", *rest])


def scripts_page() -> str:
    """The example scripts on one page."""
    sections = ["# Example scripts", "Five short scripts in the folder `examples/` of the repository. Tests run them."]
    for script in sorted(EXAMPLES.glob("*.py")):
        sections.append(f"## {script.name}\n\n```python\n{script.read_text().rstrip()}\n```")
    return "\n\n".join(sections)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and the root's pages, which are right in the repository, become links within the site."""
    for source, target in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\(\.\./((?:\.\./)*){re.escape(source)}", rf"](\1{target}", markdown)
    if page.file.src_uri in ROOT_PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    return markdown
