"""The documentation site as `make docs` built it: complete, and independent of the network. mkdocs refuses broken links."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import temposae as ts

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))
#: attributes that make a browser load something when a page opens
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}
pytestmark = pytest.mark.skipif(not PAGES, reason="make docs builds the site")


class Loaded(HTMLParser):
    """What a page loads: `urls`. `ids`: what links may name in it."""

    def __init__(self, page: Path):
        super().__init__()
        self.urls, self.ids = list[str](), set[str]()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := values.get(key))}
        is_metadata = tag == "link" and values.get("rel") in ("canonical", "next", "prev", "edit")
        url = values.get(LOADS[tag]) if tag in LOADS and not is_metadata else None
        if url and not url.startswith("data:"):
            self.urls.append(url)


def test_the_reader_sees_what_a_page_loads(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<link rel="stylesheet" href="https://a/b.css"><link rel="next" href="c.html"><script src="d.js"></script>'
        '<a href="https://e" id="f">g</a>'
    )
    assert (Loaded(page).urls, Loaded(page).ids) == (["https://a/b.css", "d.js"], {"f"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(SITE)))
def test_a_page_loads_only_files_of_the_site(page: Path) -> None:
    for url in Loaded(page).urls:
        assert not re.match(r"(?:https?:)?//", url), url
        path = url.partition("?")[0].partition("#")[0]
        place = SITE / path.lstrip("/") if url.startswith("/") else page.parent / path
        assert place.is_file(), url


def test_styles_load_only_files_of_the_site() -> None:
    for style in SITE.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", style.read_text())
        assert not [url for url in urls if re.match(r"(?:https?:)?//", url)], style


def test_no_page_is_left_out() -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    sources |= {Path("examples", f"{path.stem}.html") for path in (ROOT / "examples").glob("*.ipynb")}
    assert {path.relative_to(SITE) for path in PAGES} >= sources | {Path("contributing.html"), Path("changelog.html")}


def test_every_public_name_is_in_the_reference() -> None:
    ids = Loaded(SITE / "reference/python.html").ids | Loaded(SITE / "reference/ops.html").ids
    names = set(ts.__all__) - {"__version__"} | {f"ops.{name}" for name in ts.ops.__all__}
    assert {f"temposae.{name}" for name in names} - ids == set()
