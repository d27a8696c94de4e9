"""What `mkdocs build` needs beside the pages in docs/: the root's own pages, and the sources for the reference."""

import re
import shutil
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "build" / "docs-sources"
#: pages of the repository's root that the site shows too
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}


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
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and the root's pages, which are right in the repository, become links within the site."""
    for source, target in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\(\.\./((?:\.\./)*){re.escape(source)}", rf"](\1{target}", markdown)
    if page.file.src_uri in ROOT_PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    return markdown
