"""The Python in README and docs runs as it stands, what it calls is public, and tables and links are right."""

import inspect
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import temposae as ts
from temposae.engine.accelerate import is_accelerated
from temposae.engine.errors import UserError

from .commandline import run
from .test_guides import GUIDES, run_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/concepts").glob("*.md"))]
PEERS = re.compile(
    r"^(?:from|import) (?:sae_lens|dictionary_learning|sparsify)\b", re.M
)  # tests of their own run these
BLOCKS = {
    page: [b for b in re.findall(r"^```python\n.*?^```", page.read_text(), re.M | re.S) if not PEERS.search(b)]
    for page in PAGES
}
WITH_CODE = [page for page in PAGES if BLOCKS[page] and page not in GUIDES.values()]  # which test_guides runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where README's Python was run, with fewer tokens: it leaves runs/mine, from which pages go on."""
    place = tmp_path_factory.mktemp("reader")
    code = "\n".join(BLOCKS[ROOT / "README.md"])
    for number in ("tokens=500_000", "count=20"):
        assert number in code
    with pytest.MonkeyPatch.context() as patch:
        run_page(code.replace("500_000", "8_192").replace("count=20", "count=2, rows=32"), patch, place)
    return place


def test_readme_leaves_a_run_its_scores_and_its_page(folder: Path) -> None:
    for file in ("runs/mine/config.yaml", "runs/mine/evals/core.json", "runs/mine/report.html", "dashboard.html"):
        assert (folder / file).stat().st_size > 0


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page.name != "README.md"], ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if "store" in "".join(BLOCKS[page]) and not (folder / "store").exists():  # the command that stands above
        assert run("features", "--sae", "runs/mine", "--out", "store", "--tokens", "2000").code == 0
    run_page("\n".join(BLOCKS[page]), monkeypatch, folder)


def test_every_public_name_that_a_page_uses_is_there() -> None:
    guides = sorted((ROOT / "docs/guides").glob("*.md"))
    code = "\n".join(
        block
        for page in [*PAGES, *guides]
        for block in re.findall(r"^```python\n.*?^```|`ts\.[^`]*`", page.read_text(), re.M | re.S)
    )
    used = set(re.findall(r"\bts\.(\w+)", code)) | set(re.findall(r"^from temposae import (\w+)", code, re.M))
    assert used - set(ts.__all__) == set()
    assert used >= {"evaluate", "dashboard", "train", "load", "Part", "part", "PartSettings", "accelerate", "ops"}


@pytest.mark.parametrize("name", [name for name in ts.__all__ if not name.startswith("__")])
def test_every_public_name_shows_how_it_is_used(name: str) -> None:
    value = getattr(ts, name)
    used = rf"(?i)\b{name}[.(]|\({name}\)|\.{name}\b"  # called, derived from, or taken from the package
    assert inspect.ismodule(value) or re.search(used, value.__doc__), "no example"


class TestOneLine:
    """`repr` says sizes and key figures in a line."""

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"k": 3}, ("topk, D = 8, F = 32, K = 3, 0.6k parameters, float32 on cpu",)),
            ({"activation": "relu"}, ("relu, D = 8, F = 32, 0.6k",)),
            ({"d_out": 4, "k": 2}, ("D = 8 to 4",)),
            ({"k": 2, "decoder": "random", "mask": {"kind": "soft"}}, ("random decoder", "mask soft")),
        ],
    )
    def test_of_a_dictionary(self, settings, says):
        shown = repr(ts.SparseAutoencoder(ts.SAEConfig(d_in=8, d_sae=32, **settings)))
        assert "\n" not in shown
        assert shown.startswith("SparseAutoencoder(")
        assert all(word in shown for word in says), shown

    def test_of_a_dictionary_with_parts(self):
        from temposae.engine.composed import dictionary

        shown = repr(dictionary(ts.SAEConfig(d_in=8, d_sae=32, k=2, parts=[{"kind": "layer_norm"}])))
        assert shown.startswith("ComposedAutoencoder(topk, D = 8, F = 32, K = 2, parts layer_norm, ")
        assert "\n" not in shown

    def test_of_a_run(self, stream_of):
        stream = stream_of()
        done = ts.train(stream, ts.SAEConfig(d_in=stream.d_in, d_sae=32, k=4), ts.TrainConfig(tokens=2048, batch=512))
        shown, last = repr(done), done.metrics[-1]
        assert "\n" not in shown
        assert shown.startswith(
            f"Run({done.sae!r}; 2,048 tokens in 4 steps; FVU {last['fvu']:.4f}, L0 {last['l0']:.1f}, "
        )
        assert f"random control: FVU {last['random']['fvu']:.4f}" in shown
        assert repr(ts.Run(done.sae, None, failed="train.lr: no")) == f"Run({done.sae!r}; failed: train.lr: no)"


class TestStudy:
    def test_a_run_in_hand_scores_as_its_folder_does(self, stream_of, tmp_path, monkeypatch):
        from temposae.evals import api

        seen = []

        def measure(found, stream, kept, names, **options):
            seen.append((found, stream, kept, names, sorted(found.dictionaries), options["seed"]))
            return {name: {"loaded": found.dictionary()} for name in names}

        monkeypatch.setattr(api, "measure", measure)
        stream = stream_of()
        done = ts.train(
            stream,
            ts.SAEConfig(d_in=stream.d_in, d_sae=32, k=4),
            ts.TrainConfig(tokens=1024, batch=512),
            out=tmp_path / "run",
        )
        for sae, names in ((done, ["random", "sae"]), (done.sae, ["sae"]), (tmp_path / "run", ["random", "sae"])):
            found = ts.evaluate(sae, stream=stream, seed=3)["core"]["loaded"]
            assert found.W_dec.equal(done.sae.W_dec)
            assert seen[-1][1:] == (stream, None, ["core"], names, 3)
        ts.evaluate(str(tmp_path / "run"), ["core", "scr"])
        assert seen[-1][2:4] == (tmp_path / "run", ["core", "scr"])
        ts.evaluate(tmp_path / "run", "all", layer=0)
        assert seen[-1][2] is None
        assert len(seen[-1][3]) > 5

    def test_what_can_not_be_is_refused_before_any_work(self):
        sae = ts.SparseAutoencoder(ts.SAEConfig(d_in=8, d_sae=32, k=2))
        for ask in (ts.evaluate, ts.dashboard):
            with pytest.raises(UserError, match="stream: needed for a dictionary object"):
                ask(sae)
            with pytest.raises(UserError, match="sae: nowhere does not exist"):
                ask("nowhere")
        with pytest.raises(UserError, match="eval: cores is not allowed"):
            ts.evaluate(sae, "cores")

    def test_latents_of_a_dictionary_in_hand_are_shown(self, stream_of, tmp_path):
        stream = stream_of()
        sae = ts.SparseAutoencoder(ts.SAEConfig(d_in=stream.d_in, d_sae=32, k=4))
        shown = ts.dashboard(sae, tmp_path / "page.html", stream=stream, latents=[3, 17], rows=8)
        assert [one["latent"] for one in shown["latents"]] == [3, 17]
        assert "<html" in (tmp_path / "page.html").read_text()
        with pytest.raises(UserError, match="latents: '32' is not allowed"):
            ts.dashboard(sae, stream=stream, latents=[32])


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_lists_go_on_as_the_site_reads_them(page: Path) -> None:
    """Behind an empty line, mkdocs takes text that is indented by fewer than four spaces out of its list."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    assert re.findall(r"^\n {1,3}\S.*", text, re.M) == []


class TestReadme:
    README = ROOT / "README.md"

    def test_speeds_are_those_of_the_results(self) -> None:
        (name, table, about), = re.findall(
            r"<!-- (bench/results/\S+) -->\n((?:\|.*\n)+)\n(.*)$", self.README.read_text(), re.M
        )  # fmt: skip
        result = json.loads((ROOT / name).read_text())
        ms = {(case["provider"], case["F"]): case["ms"] for case in result["cases"]}
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        assert {row[0] for row in rows} == {provider for provider, _ in ms}
        for provider, *cells in rows:
            for F, shown, slower in zip((4096, 16384), cells[::2], cells[1::2], strict=True):
                time = ms[provider, F]
                assert shown == (f"{time:.0f}" if time >= 1000 else f"{time:.3g}")
                assert slower == f"{time / ms['temposae', F]:.2f} x"
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        expected = f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit'][:12]}; "
        assert about == f"{expected}`temposae bench step --preset cpu`"

    def test_features_are_those_of_the_comparison(self) -> None:
        section = self.README.read_text().partition("## Beside other libraries\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\|.*\|$", section, re.M)
        assert len(rows) > 10
        assert set(rows) <= set((ROOT / "docs/comparison.md").read_text().splitlines())

    def test_the_comparison_is_with_the_versions_at_hand(self) -> None:
        text = (ROOT / "docs/comparison.md").read_text()
        pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
        names = ("sae-lens", "dictionary-learning", "eai-sparsify")
        assert f"| {ts.__version__} | {' | '.join(pinned[name] for name in names)} |" in text

    @pytest.mark.skipif(find_spec("sae_lens") is None, reason="sae_lens is not installed")
    def test_what_it_accelerates_is_accelerated(self) -> None:
        (block,) = re.findall(r"^```python\n(from sae_lens.*?)^```", self.README.read_text(), re.M | re.S)
        names = {"ts": ts}
        exec(block, names)
        assert is_accelerated(names["sae"])


def anchors(page: Path) -> set[str]:
    """What links may name within a page: its headings, as GitHub and the site write them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_the_roots_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_page_of_commands_is_what_the_parsers_say(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "docs/command_line.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert (ROOT / "docs/reference/cli.md").read_text() == printed, "run: make docs-reference"
