"""Dashboards: figures of latents whose activations are known, and the page in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.engine.stream import ActivationStream, LanguageModel, TokenRows
from temposae.engine.stream.model_loading import TESTBED
from temposae.engine.testbed.language import HELD_OUT
from temposae.evals.dashboard import dashboard, numbers, page
from temposae.evals.token_texts import TokenTexts

from ..commandline import run

R, T, D = 40, 50, 6
EARLY, DEAD, OFTEN, SELDOM, LATE, LAST = range(D)  # what each coordinate is


def activations() -> np.ndarray:
    """[R, T, D] in float32, all values different."""
    draw = np.random.default_rng(0)
    acts = draw.permutation(R * T * D).reshape(R, T, D) / 1000 + 1
    keep = draw.random((R, T, D)) < np.array([0.5, 0, 0.9, 0.02, 0.5, 0.3])
    keep[:, 10:, EARLY] = False
    keep[:, :30, LATE] = False
    keep[:, :43, LAST] = False
    return np.float32(acts * keep)


class Words:
    """A tokenizer that puts a space between any two tokens."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"w{i}" for i in ids)

    def __len__(self) -> int:
        return R * T


class Planted:
    """A stream of R rows of T tokens, each token a word of its own, in which `acts` are found. The first token of a row
    is special; the last rows end early."""

    def __init__(self, acts: np.ndarray):
        x = torch.from_numpy(acts).flatten(0, 1)
        self.tokens = torch.arange(R * T).view(R, T)
        self.length = torch.full((R,), T)
        self.length[-10:] = T - 8
        self.text = SimpleNamespace(name="planted text")
        self.positions = T
        self.model = SimpleNamespace(
            name="planted", hook="somewhere", device=torch.device("cpu"), widths={"somewhere": D},
            direct_logits=self.direct_logits, tokenizer=Words(),
        )  # fmt: skip
        self.x = x

    def direct_logits(self, directions: torch.Tensor) -> torch.Tensor:
        """Latent j raises the tokens t with t = j modulo 7 by t, and lowers the others by half of it."""
        t = torch.arange(R * T + 5)  # more logits than words
        return torch.stack([torch.where(t % 7 == int(d.argmax()), t, -t / 2) for d in directions]).float()

    def held_out(self, rows: int) -> Any:
        for at in (slice(0, 25), slice(25, R)):
            number = torch.arange(R)[at] + 100
            yield TokenRows(self.tokens[at], self.length[at], (2 * number)[:, None].expand(-1, T), number)

    def read(self, rows: TokenRows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        pos = torch.arange(T)
        return {"somewhere": self.x[rows.tokens]}, (pos > 0) & (pos < rows.length[:, None])


def sae() -> SparseAutoencoder:
    """A latent of each coordinate."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=D, activation="relu", k=4))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(D))
        sae.W_enc.copy_(torch.eye(D))
    return sae


def planted(**settings: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What is found, the activations [R, T, D], and which tokens count [R, T]."""
    stream, acts = Planted(activations()), activations()
    rows = TokenRows(stream.tokens, stream.length, stream.tokens, stream.tokens[:, 0])
    return dashboard(cast(Any, stream), sae(), name="run", **settings), acts, stream.read(rows)[1].numpy()


def test_figures_are_those_of_the_activations():
    found, acts, kept = planted(latents=list(range(D)))
    assert (found["tokens"], found["rows"], found["context"]) == (int(kept.sum()), R, T)
    assert found["dead_fraction"] == pytest.approx(1 / D)
    assert found["l0"] == pytest.approx((acts[kept] > 0).sum() / kept.sum(), rel=1e-4)
    bins = found["bins"]
    assert len(bins) == 32
    assert [first for first, _, _ in bins[1:]] == [last + 1 for _, last, _ in bins[:-1]]
    assert (bins[0][0], bins[-1][1]) == (0, T - 1)
    assert [n for _, _, n in bins] == [int(kept[:, a : b + 1].sum()) for a, b, _ in bins]
    for one in found["latents"]:
        own = np.where(kept, acts[:, :, one["latent"]], 0)
        on = own > 0
        if one["latent"] == DEAD:
            continue
        assert one["firing_rate"] == pytest.approx(on.sum() / kept.sum(), rel=1e-4)
        assert one["mean"] == pytest.approx(own[on].mean(), rel=1e-4)
        assert one["max"] == pytest.approx(own.max(), rel=1e-4)
        for (a, b, n), rate, mean in zip(bins, *one["profile"].values(), strict=True):
            here = on[:, a : b + 1]
            assert rate == (pytest.approx(here.sum() / n, rel=1e-4) if n else None)
            assert mean == (pytest.approx(own[:, a : b + 1][here].mean(), rel=1e-4) if here.any() else None)
        activity = [own[:, a : b + 1].sum() / max(n, 1) for a, b, n in bins]
        assert one["peak"] == bins[int(np.argmax(activity))][:2]
    early, late = (found["latents"][j]["peak"] for j in (EARLY, LATE))
    assert early[1] < 10 <= 30 <= late[0]
    json.dumps(found, allow_nan=False)


def test_a_bin_of_few_tokens_is_no_peak(monkeypatch: pytest.MonkeyPatch):
    """One row alone goes on to the end, and there the latent is on at each token."""
    acts = activations()
    acts[:, :, LAST] = 0
    acts[:, 20, LAST] = 1
    acts[0, 45:, LAST] = 9
    stream = Planted(acts)
    stream.length[1:] = T - 8
    (found,) = dashboard(cast(Any, stream), sae(), name="run", latents=[LAST])["latents"]
    assert found["profile"]["firing_rate"][-1] == 1
    assert found["peak"][0] <= 20 <= found["peak"][1]


@pytest.mark.parametrize("latent", [OFTEN, LATE])
def test_strongest_contexts_come_from_different_rows(latent: int):
    found, acts, kept = planted(latents=[latent])
    own = np.where(kept, acts[:, :, latent], 0)
    contexts = found["latents"][0]["strongest"]
    rows = np.argsort(-own.max(1))[:12]
    assert [c["row"] for c in contexts] == (rows + 100).tolist()
    assert [c["value"] for c in contexts] == pytest.approx(own.max(1)[rows].tolist(), rel=1e-4)
    for row, c in zip(rows, contexts, strict=True):
        pos = int(own[row].argmax())
        start, end = max(0, pos - 24), min(pos + 13, np.flatnonzero(kept[row])[-1] + 1)
        assert (c["position"], c["document"], c["peak"]) == (pos, 2 * (row + 100), pos - start)
        assert c["tokens"] == [f" w{t}" for t in range(row * T + start, row * T + end)]
        expected = np.where(kept, own, np.nan)[row, start:end]
        assert np.array(c["values"], float) == pytest.approx(expected, rel=1e-4, nan_ok=True)
    if latent == OFTEN:
        assert None in {v for c in contexts for v in c["values"]}  # the special token before a row
    else:
        assert min(len(c["tokens"]) - c["peak"] for c in contexts) < 13  # one ends with its row


def test_ordinary_contexts_are_of_the_middle_and_drawn_by_the_seed():
    found, acts, kept = planted(latents=[EARLY])
    own = acts[:, :, EARLY][kept]
    low, high = np.quantile(own[own > 0], (0.4, 0.6))
    ordinary, strongest = (found["latents"][0][kind] for kind in ("ordinary", "strongest"))
    assert len(ordinary) == 4
    assert all(low <= c["value"] * 1.0001 and c["value"] * 0.9999 <= high for c in ordinary)
    assert len({c["row"] for c in ordinary}) == 4
    assert not {c["row"] for c in ordinary} & {c["row"] for c in strongest}
    assert planted(latents=[EARLY])[0] == found
    assert planted(latents=[DEAD, EARLY])[0]["latents"][1] == found["latents"][0]  # whatever else is asked for
    assert planted(latents=[EARLY], seed=1)[0]["latents"][0]["ordinary"] != ordinary


def test_latents_are_spread_over_firing_rates():
    _, acts, kept = planted(latents=[0])
    rates = (acts[kept] > 0).mean(0)
    ranked = [j for j in np.argsort(-rates).tolist() if rates[j] > 0]
    assert len(ranked) == D - 1
    assert [one["latent"] for one in planted()[0]["latents"]] == ranked
    assert [one["latent"] for one in planted(count=3)[0]["latents"]] == [ranked[0], ranked[2], ranked[4]]
    assert [one["latent"] for one in planted(count=1)[0]["latents"]] == ranked[:1]


def test_a_dead_latent_that_is_asked_for_is_shown_as_dead():
    (one,) = planted(latents=[DEAD])[0]["latents"]
    figures = {key: one[key] for key in ("firing_rate", "mean", "max", "peak", "strongest", "ordinary")}
    assert figures == {"firing_rate": 0, "mean": None, "max": None, "peak": None, "strongest": [], "ordinary": []}
    assert set(one["profile"]["firing_rate"]) == {0}
    assert len(one["logits"]["top"]) == 10


def test_logits_are_the_ends_and_of_words_only():
    found, _, _ = planted(latents=[LATE, EARLY])
    for j, one in zip((LATE, EARLY), found["latents"], strict=True):
        top = [t for t in range(R * T - 1, 0, -1) if t % 7 == j][:10]
        bottom = [t for t in range(R * T - 1, 0, -1) if t % 7 != j][:10]
        assert [list(pair) for pair in one["logits"]["top"]] == [[f" w{t}", t] for t in top]
        assert [list(pair) for pair in one["logits"]["bottom"]] == [[f" w{t}", -t / 2] for t in bottom]


def test_there_are_no_logits_where_the_model_has_none():
    stream = Planted(activations())
    stream.model.direct_logits = lambda directions: None
    found = dashboard(cast(Any, stream), sae(), name="run", latents=[LATE])["latents"][0]
    assert found["logits"] is None
    assert found["strongest"] == planted(latents=[LATE])[0]["latents"][0]["strongest"]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_character_of_several_tokens_is_the_last_one_s():
    tokens = list("aé日🎉b".encode())
    assert TokenTexts(Bytes()).along(tokens) == ["a", "", "é", "", "", "日", "", "", "", "🎉", "b"]
    broken = [*tokens[4:6], *tokens[6:10]]  # a character without its first byte, then a whole one
    assert TokenTexts(Bytes()).along(broken) == ["\ufffd", "\ufffd", "", "", "", "🎉"]


@pytest.mark.parametrize("given", ["3,x", "6", "-1", "1.5", "", "3,,4", "²"])
def test_numbers_that_are_no_latents(given: str):
    with pytest.raises(UserError, match=r"latents: '.*' is not allowed; give numbers from 0 to 5"):
        numbers(given, 6)


def test_numbers_are_read_once_each():
    assert numbers("3, 1,3,5", 6) == [3, 1, 5]


def test_direct_logits_are_those_worked_out_by_hand(testbed: LanguageModel):
    weights = {name: tensor.double() for name, tensor in load_file(TESTBED / "model.safetensors").items()}
    settings = json.loads((TESTBED / "config.json").read_text())
    directions = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    x = directions.double()
    x = x / (x.square().mean(1, keepdim=True) + settings["rms_norm_eps"]).sqrt() * (1 + weights["model.norm.weight"])
    expected = x @ weights["model.embed_tokens.weight"].T
    found = testbed.direct_logits(directions)
    assert found is not None
    assert found.double() == pytest.approx(expected.numpy(), abs=1e-4)
    capped = settings["final_logit_softcapping"] * (expected / settings["final_logit_softcapping"]).tanh()
    assert (capped - expected).abs().max() > 0.1  # soft-capping would have shown
    assert testbed.direct_logits(torch.ones(3, 64)) is None


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_direct_logits_leave_out_what_is_there_without_the_direction():
    lens = pytest.importorskip("transformer_lens")
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("this transformer_lens has no HookedTransformer")
    held = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=1, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_mlp=24, d_vocab=50, act_fn="gelu", device="cpu"
        )
    )
    with torch.no_grad():
        for p in (held.ln_final.w, held.ln_final.b, held.unembed.W_U, held.unembed.b_U):
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    normed = (x - x.mean(1, keepdim=True)) / x.var(1, correction=0, keepdim=True).add(1e-5).sqrt()
    expected = (normed * held.ln_final.w) @ held.unembed.W_U  # no bias is left
    found = LanguageModel(held).direct_logits(x)
    assert found is not None
    assert found.numpy() == pytest.approx(expected.detach().numpy(), abs=1e-4)


def test_of_the_embedded_model(stream_of):
    stream: ActivationStream = stream_of(drop_special=True)
    own = SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=4))
    found = dashboard(stream, own, name="run", count=5, rows=12)
    assert (found["rows"], found["l0"], len(found["latents"])) == (12, 4, 5)
    kept = [stream.read(rows)[1] for rows in stream.held_out(12)]
    assert found["tokens"] == sum(int(each.sum()) for each in kept)  # neither <bos> nor padding
    (rows,) = stream.held_out(12)
    for context in found["latents"][0]["strongest"]:
        row, pos = context["row"] - HELD_OUT, context["position"]
        assert context["document"] == context["row"]
        code = own.encode(stream.model.activations(rows.tokens)[row, pos][None])
        assert context["value"] == pytest.approx(float(code[0, found["latents"][0]["latent"]]), rel=1e-3)
        start = pos - context["peak"]
        ids = rows.tokens[row, start : start + len(context["tokens"])]
        assert "".join(context["tokens"]).strip() == stream.model.tokenizer.decode(ids)
    narrow = SparseAutoencoder(SAEConfig(d_in=64, d_sae=8, k=2))
    with pytest.raises(UserError, match="sae: d_in = 64 does not fit"):
        dashboard(stream, narrow, name="run")


# The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run of a dictionary for the embedded model, its checkpoint, and one without a run."""
    monkeypatch.chdir(tmp_path)
    own = SparseAutoencoder(SAEConfig(d_in=128, d_sae=32, k=2))
    settings = RunConfig(stream=StreamConfig(hook="blocks.1.hook_resid_post", context=32), sae=own.cfg)
    checkpoint.write(checkpoint.place(tmp_path / "mine", 7), 7, {"sae": (own.cfg, own.state_dict())}, settings)
    checkpoint.save(own, tmp_path / "alone")
    return tmp_path


def test_a_page_of_a_run(place: Path):
    code, out, err = run("dashboard", "--sae", "mine", "--latents", "3,17", "--rows", "8", "--json", "found.json")
    assert code == 0, err
    assert out.endswith("tokens: mine/dashboard.html\n")
    found = json.loads((place / "found.json").read_text())
    assert json.loads(Elements((place / "mine/dashboard.html").read_text()).texts["data"]) == found
    assert [one["latent"] for one in found["latents"]] == [3, 17]
    assert (found["name"], found["model"], found["d_sae"], found["rows"]) == ("mine", "testbed", 32, 8)
    again = (
        "--sae",
        "mine/checkpoints/step_00000007",
        "--layer",
        "2",
        "--count",
        "4",
        "--rows",
        "8",
        "--out",
        "p.html",
    )
    code, out, err = run("dashboard", *again)
    assert code == 0, err
    found = json.loads(Elements((place / "p.html").read_text()).texts["data"])
    assert (found["hook"], len(found["latents"])) == ("blocks.2.hook_resid_post", 4)


REFUSED = {
    "no such latent": ("--sae mine --latents 3,32", "latents: '32' is not allowed; give numbers from 0 to 31"),
    "no number": ("--sae mine --latents three", "latents: 'three' is not allowed"),
    "nowhere to write": ("--sae mine/checkpoints/step_00000007", "out: missing"),
    "a folder that does not exist": ("--sae mine --out nowhere/p.html", "out: nowhere/p.html can't be written"),
    "no such run": ("--sae yours", "sae: yours does not exist"),
    "unknown model": ("--sae alone --out p.html", "model: alone does not say what it was trained on"),
}


@pytest.mark.parametrize(("argv", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(argv: str, words: str, place: Path):
    before = sorted(place.rglob("*"))
    code, _, err = run("dashboard", *argv.split())
    assert (code, len(err.splitlines())) == (2, 1), err
    assert err.startswith(f"error: {words}")
    assert sorted(place.rglob("*")) == before


# The page. Tokens in it are as hostile as text can be.

HOSTILE = {
    0: "</script><script>document.title='broken'</script>",
    1: "<!--<script>",
    2: "\n",
    3: " ",
    4: '<img src="x">',
}


def hostile() -> dict[str, Any]:
    """Five latents, of which the second is dead; the first is active on tokens that would break a page. No token has a
    digit: token 12 is wbc."""
    found = planted(latents=[EARLY, DEAD, OFTEN, SELDOM, LATE])[0]
    letters = str.maketrans("0123456789", "abcdefghij")
    for one in found["latents"]:
        for context in one["strongest"] + one["ordinary"]:
            context["tokens"] = [token.translate(letters) for token in context["tokens"]]
        one["logits"] = {
            end: [(token.translate(letters), value) for token, value in pairs] for end, pairs in one["logits"].items()
        }
    found["name"] = "<b>run</b>"
    context = found["latents"][0]["strongest"][0]
    for i, text in HOSTILE.items():
        context["values"][i] = 1.0
        context["tokens"][i] = text
    context["peak"] = 0
    return found


class Elements(HTMLParser):
    """Tags with their attributes, and the text of each element that has an id."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._id: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id")

    def handle_data(self, data: str) -> None:
        if self._id is not None:
            self.texts[self._id] = self.texts.get(self._id, "") + data


def test_a_page_asks_nothing_of_a_network_and_holds_the_figures():
    found = hostile()
    text = page(found)
    elements = Elements(text)
    assert json.loads(elements.texts["data"]) == json.loads(json.dumps(found))
    assert [tag for tag, _ in elements.tags].count("script") == 2
    wanted = [a[k] for _, a in elements.tags for k in ("src", "href", "srcset", "action", "data") if a.get(k)]
    assert wanted == ["#details"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|insertAdjacent|document\.write", text)
    (policy,) = (a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.split(";")[:3] == ["default-src 'none'", " style-src 'unsafe-inline'", " script-src 'unsafe-inline'"]


# What a person does, and what the page then shows, in a <pre> at its end.
DRIVER = """
<script>{
const said = {};
const all = query => [...document.querySelectorAll(query)];
const list = () => all("#table tbody tr:not([hidden]) td:first-child").map(cell => cell.textContent);
const now = () => document.querySelector("#table tr[aria-current] td")?.textContent;
const sorted = () => all("th[aria-sort]").map(th => `${th.textContent} ${th.getAttribute("aria-sort")}`).join();
const field = document.getElementById("search"), box = document.getElementById("details");
const press = (key, on = document.activeElement) =>
  on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const type = text => { field.value = text; field.dispatchEvent(new Event("input", {bubbles: true})); };
const look = name => said[name] = {list: list(), now: now(), sorted: sorted(), hash: location.hash};

look("begun");
said.title = document.title;
said.header = document.querySelector("header").textContent;
said.injected = all("img, b").length;
said.meta = all("#details .where")[1].textContent;
const shade = e => Number(e.style.getPropertyValue("--a"));
said.shades = [...all("#details .contexts li")[1].querySelectorAll(".act")].map(shade);
said.charts = all("#details svg").map(e => [e.getAttribute("aria-label"), e.querySelectorAll("rect").length,
  e.textContent.includes("position in the row")]);
said.logits = all("#details .logits").map(e => e.textContent);
said.kinds = all("#details .contexts").map(e => e.children.length);
press("j"); look("j"); press("j");
said.tokens = [...all("#details .contexts li")[0].querySelectorAll(".act")].map(e => e.textContent);
said.peak = all("#details mark")[0].textContent;
press("ArrowDown"); look("down"); press("k"); look("k"); press("ArrowUp"); look("up");
said.focus = document.activeElement.textContent;
for (let i = 0; i < 9; i++) press("j");
look("end");
said.dead = box.textContent;
box.focus(); press("ArrowUp"); look("reading"); box.blur();
all("th button")[0].click(); look("clicked"); all("th button")[0].click(); look("twice");
press("s"); look("s"); press("s"); look("ss"); all("th button")[2].click(); look("up again");
press("/"); said.typing = document.activeElement.id;
type("wbc"); look("search"); press("k"); look("typed k");
type("wbjeb"); look("logit"); type("2"); look("number");
type("<SCRIPT>DOCUMENT"); look("hostile"); press("Enter"); look("enter");
said.count = document.getElementById("count").textContent;
press("Escape"); look("cleared"); said.field = field.value; press("Escape"); said.left = document.activeElement.id;
press("?"); said.keys = document.getElementById("keys").open; document.getElementById("keys").close();
location.hash = "#latent=4";
window.addEventListener("hashchange", () => {
  look("hash");
  said.heading = box.querySelector("h2").textContent;
  const pre = document.createElement("pre");
  pre.id = "said";
  pre.textContent = JSON.stringify(said);
  document.body.append(pre);
}, {once: true});
}</script>
"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser: chromium, chromium-browser or google-chrome"
)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page said to whoever used it."""
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "page.html"
    path.write_text(page(hostile()).replace("</body>", DRIVER + "</body>"))
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    texts = Elements(done.stdout).texts
    assert "said" in texts, done.stderr[-2000:]
    return json.loads(texts["said"])


RATE = ["2", "4", "0", "3", "1"]  # the latents by firing rate, the dead one last


@needs_browser
def test_the_page_in_a_browser_begins_with_the_most_frequent_latent(said: dict[str, Any]):
    rates = {str(one["latent"]): one["firing_rate"] for one in hostile()["latents"]}
    assert sorted(rates, key=lambda j: -rates[j]) == RATE
    assert said["begun"] == {"list": RATE, "now": "2", "sorted": "Fires on descending", "hash": "#latent=2"}
    assert said["kinds"] == [12, 4]
    own = hostile()["latents"][2]["strongest"][1]
    assert f"position {own['position']}" in said["meta"]
    assert f"document {own['document']}" in said["meta"]
    assert f"row {own['row']}" in said["meta"]
    most = hostile()["latents"][2]["max"]
    assert said["shades"] == pytest.approx([v / most for v in own["values"] if v], rel=1e-3)
    assert [(label.split(", by")[0], named) for label, _, named in said["charts"]] == [
        ("share of tokens on which it fires", True), ("mean activation where it fires", True)
    ]  # fmt: skip
    profile = hostile()["latents"][2]["profile"]
    assert [bars for _, bars, _ in said["charts"]] == [sum(map(bool, profile[k])) for k in ("firing_rate", "mean")]
    for shown, end in zip(said["logits"], hostile()["latents"][2]["logits"].values(), strict=True):
        assert shown == "".join(f"·{t.strip()}{'+' if v > 0 else '−'}{abs(v):.2f}" for t, v in end)


@needs_browser
def test_keys_move_through_the_latents(said: dict[str, Any]):
    steps = {name: said[name]["now"] for name in ("j", "down", "k", "up", "end", "reading")}
    assert steps == {"j": "4", "down": "3", "k": "0", "up": "4", "end": "1", "reading": "1"}
    assert {said[name]["hash"] for name in ("j", "up")} == {"#latent=4"}
    assert said["focus"] == "4"
    assert "dead" in said["dead"]
    assert said["keys"] is True


@needs_browser
def test_columns_sort_both_ways_and_the_dead_stay_last(said: dict[str, Any]):
    assert (said["clicked"]["list"], said["clicked"]["sorted"]) == (["0", "1", "2", "3", "4"], "Latent ascending")
    assert (said["twice"]["list"], said["twice"]["sorted"]) == (["4", "3", "2", "1", "0"], "Latent descending")
    assert (said["s"]["list"], said["s"]["sorted"]) == (RATE, "Fires on descending")
    means = {str(one["latent"]): one["mean"] or 0 for one in hostile()["latents"]}
    assert (said["ss"]["list"], said["ss"]["sorted"]) == (sorted(means, key=lambda j: -means[j]), "Mean descending")
    assert said["ss"]["list"][-1] == "1"
    alive = sorted(means.keys() - {"1"}, key=lambda j: means[j])
    assert (said["up again"]["list"], said["up again"]["sorted"]) == ([*alive, "1"], "Mean ascending")
    assert {said[name]["now"] for name in ("clicked", "twice", "s", "ss")} == {"1"}


@needs_browser
def test_the_search_filters_and_is_cleared(said: dict[str, Any]):
    found = hostile()

    def holds(one: dict[str, Any], text: str, least: float) -> bool:
        pairs = [pair for c in one["strongest"] for pair in zip(c["tokens"], c["values"], strict=True)]
        return any(text in token for token, value in pairs if (value or 0) >= least)

    active = {str(one["latent"]) for one in found["latents"] if holds(one, "wbc", 0.001)}
    assert active < {str(one["latent"]) for one in found["latents"] if holds(one, "wbc", 0)}
    assert set(said["search"]["list"]) == active == {"0", "2", "3"}
    assert said["logit"]["list"] == ["2"]  # 1941 = 2 modulo 7, and not one of the ten largest
    assert said["typing"] == "search"
    assert said["typed k"] == said["search"]
    assert said["number"]["list"] == ["2"]
    assert (said["hostile"]["list"], said["hostile"]["now"]) == (["0"], "1")
    assert said["enter"]["now"] == "0"
    assert said["count"] == "1 of 5"
    assert (len(said["cleared"]["list"]), said["field"], said["left"]) == (5, "", "")


@needs_browser
def test_the_address_chooses_a_latent(said: dict[str, Any]):
    assert (said["hash"]["now"], said["heading"]) == ("4", "Latent 4")


@needs_browser
def test_hostile_tokens_are_text(said: dict[str, Any]):
    assert said["title"] == "Latents of <b>run</b>"
    assert said["tokens"][:5] == [HOSTILE[0], HOSTILE[1], "↵", "·", HOSTILE[4]]
    assert said["peak"] == HOSTILE[0]
    assert said["injected"] == 0
