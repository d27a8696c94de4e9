"""Several evals of a run: kept in its folder, found again there, and one that can't be had doesn't stop the others."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage.checkpoint import find
from temposae.engine.train import train
from temposae.evals import result_files, run_evals, suite
from temposae.evals.run_evals import evaluate
from threadpoolctl import threadpool_info, threadpool_limits


@pytest.fixture
def trained(stream_of, tmp_path, monkeypatch):
    """trained(): a run folder; evals `coin` (a draw) and `never` are there to be had."""
    stream = stream_of()
    train(stream, SAEConfig(d_in=128, d_sae=32, k=2), TrainConfig(tokens=1024, batch=256), out=tmp_path / "run")
    calls = []

    def coin(evaluation):
        calls.append(evaluation.seed)
        return {"draw": float(evaluation.generator("coin").random()), "controls": {}}

    def never(evaluation):
        raise UserError("data: there is none")

    monkeypatch.setattr(suite, "EVALS", {"coin": ("suite", "coin"), "never": ("suite", "never")})
    monkeypatch.setattr(suite, "JUDGED", {})
    monkeypatch.setattr(suite, "coin", coin, raising=False)
    monkeypatch.setattr(suite, "never", never, raising=False)
    return tmp_path / "run", stream, calls


def test_a_result_is_kept_and_found_again(trained):
    folder, stream, calls = trained
    first = evaluate(find(folder), stream, folder, ["coin"])
    assert result_files.read(folder, "coin") == first["coin"]
    assert evaluate(find(folder), stream, folder, ["coin"]) == first
    assert calls == [0]
    (folder / "evals" / "coin.json").write_text("{")  # cut short: measured again
    assert evaluate(find(folder), stream, folder, ["coin"])["coin"]["draw"] == first["coin"]["draw"]
    other = evaluate(find(folder), stream, folder, ["coin"], seed=1)
    assert other["coin"]["draw"] != first["coin"]["draw"]
    evaluate(find(folder), stream, folder, ["coin"], seed=1, fresh=True)
    assert calls == [0, 0, 1, 1]


@pytest.mark.parametrize("change", ["version", "dictionary"])
def test_a_result_of_something_else_is_not_taken(trained, monkeypatch, change):
    folder, stream, calls = trained
    evaluate(find(folder), stream, folder, ["coin"])
    found = find(folder)
    if change == "version":
        monkeypatch.setattr(run_evals, "VERSION", run_evals.VERSION + 1)
    else:
        path = folder / "evals" / "coin.json"
        kept = json.loads(path.read_text())
        kept["of"]["dictionary"] = "0" * 64
        path.write_text(json.dumps(kept))
    evaluate(found, stream, folder, ["coin"])
    assert calls == [0, 0]


def test_an_eval_that_cannot_be_had_is_named_and_the_others_go_on(trained):
    folder, stream, _ = trained
    found = evaluate(find(folder), stream, folder, ["never", "coin"])
    assert list(found) == ["never", "coin"]
    assert found["never"]["skipped"] == "data: there is none"
    assert 0 <= found["coin"]["draw"] < 1
    with pytest.raises(UserError, match="^data: there is none$"):
        evaluate(find(folder), stream, None, ["never"])
    with pytest.raises(UserError, match="^eval: other is not allowed; it must be coin, never or all$"):
        evaluate(find(folder), stream, None, ["other"])


def test_what_was_skipped_is_tried_again(trained, monkeypatch):
    folder, stream, _ = trained
    evaluate(find(folder), stream, folder, ["never", "coin"])
    monkeypatch.setattr(suite, "never", lambda evaluation: {"there": 1.0, "controls": {}})
    assert evaluate(find(folder), stream, folder, ["never", "coin"])["never"]["there"] == 1


def test_a_result_of_other_files_is_not_taken(trained, tmp_path, monkeypatch):
    folder, stream, calls = trained
    monkeypatch.setattr(suite, "FILES", {"coins": ("coin", True), "other": ("never", True)})
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("heads")
    two.mkdir()
    (two / "part").write_text("heads")

    def measured(*given: str) -> int:
        before = len(calls)
        evaluate(find(folder), stream, folder, ["coin"], files=suite.named_files(given))
        return len(calls) - before

    assert (measured(f"coins={one}"), measured(f"coins={one}"), measured(f"coins={one}", "other=x")) == (1, 0, 0)
    assert (measured(f"coins={one}", f"coins={two}"), measured(f"coins={one}", f"coins={two}")) == (1, 0)
    (two / "part").write_text("heads, tails")
    assert (measured(f"coins={one}", f"coins={two}"), measured(f"coins={one}")) == (1, 1)
    one.write_text("tails")
    assert (measured(f"coins={one}"), measured()) == (1, 1)


def test_what_sparse_probing_reads(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    file, folder = f"{tmp_path}/a.csv?text=body", f"fancyzhx/ag_news?path={tmp_path}"
    sources = ("topic", "fancyzhx/ag_news", file, folder, f"{tmp_path}/absent.csv")
    found = suite.input_digests("sparse_probing", sources, {})
    assert [given for given, digest in found.items() if digest is not None] == [file, folder]
    assert suite.input_digests("core", sources, {"blimp": ("a",)}) == {}


def test_what_tpp_and_scr_read(tmp_path):
    """Labels of the embedded language are read by neither, a set without an attribute not by SCR."""
    (tmp_path / "a.csv").write_text("text,label\n")
    one, two = f"{tmp_path}/a.csv", f"{tmp_path}/a.csv?attribute=sex"
    bios = f"LabHC/bias_in_bios_class_set1?path={tmp_path}"
    sources = ("topic", one, two, bios, f"fancyzhx/ag_news?path={tmp_path}")
    assert list(suite.input_digests("tpp", sources, {})) == list(sources[1:])
    assert list(suite.input_digests("scr", sources, {})) == [two, bios]
    assert suite.input_digests("scr", ("topic",), {}) == {}


@pytest.mark.parametrize(
    ("sets", "tpp", "scr"),
    [
        ((), "x.txt has no labels; give labelled texts, --set FILE", "x.txt has no labels; give --set FILE.*&attribute="),
        (("HERE",), None, "no set has a second label; give --set FILE.*&attribute=COLUMN or --set LabHC"),
        (("HERE?attribute=sex",), None, None),
        (("HERE", "HERE?attribute=sex"), None, None),
        (("absent.csv?attribute=sex",), "--set absent.csv.* does not exist", "--set absent.csv.* does not exist"),
    ],
)  # fmt: skip
def test_what_is_missing_for_tpp_and_scr_on_another_text(stream_of, tmp_path, sets, tpp, scr):
    (tmp_path / "a.csv").write_text("text,label,sex\n")
    sets = [source.replace("HERE", f"{tmp_path}/a.csv") for source in sets]
    stream = SimpleNamespace(text=SimpleNamespace(name="x.txt"), model=stream_of().model)
    for name, expected in (("tpp", tpp), ("scr", scr)):
        reasons = suite.missing_inputs(name, stream, SAEConfig(d_in=128, d_sae=8, k=2), sets, {})
        assert (reasons == {}) == (expected is None)
        assert expected is None or re.match(expected.replace("?", r"\?"), reasons[""])
        if "absent" not in "".join(sets):  # the embedded language has labels of its own
            assert suite.missing_inputs(name, stream_of(), SAEConfig(d_in=128, d_sae=8, k=2), sets, {}) == {}


@pytest.mark.parametrize("name", ["mdl", "scr", "tpp"])
def test_a_result_of_another_protocol_is_not_taken(trained, monkeypatch, name):
    folder, stream, calls = trained
    monkeypatch.setattr(suite, "EVALS", {name: ("suite", "coin"), "coin": ("suite", "coin")})
    for function in ("write_report", "output"):  # of figures that a coin doesn't have
        monkeypatch.setattr(run_evals, function, lambda *given, **settings: None)
    for protocol, count in (("temposae", 2), ("temposae", 2), ("saebench", 3), ("saebench", 3), ("temposae", 4)):
        evaluate(find(folder), stream, folder, [name, "coin"], protocol=protocol)  # coin has no protocol
        assert len(calls) == count
    with pytest.raises(UserError, match="^protocol: mine is not allowed; it must be temposae or saebench$"):
        evaluate(find(folder), stream, folder, ["coin"], protocol="mine")


def test_files_are_given_by_name():
    files = suite.named_files(["blimp=a=b", "forget_text=c", "blimp=d"])
    assert files == {"blimp": ("a=b", "d"), "forget_text": ("c",)}
    for given, message in (
        (
            ["forget=x"],
            "^file: forget=x is not allowed; give NAME=PATH with one of the names forget_questions, retain_q",
        ),
        (["blimp"], "^file: blimp is not allowed; give NAME=PATH"),
        (
            ["forget_text=a", "forget_text=b"],
            "^file: forget_text=b is not allowed; give forget_text once, it is a already$",
        ),
    ):
        with pytest.raises(UserError, match=message):
            suite.named_files(given)


def test_what_is_drawn_depends_on_seed_and_purpose_alone(trained):
    folder, stream, _ = trained
    found = find(folder)
    one, two = (evaluate(found, stream, None, names)["coin"]["draw"] for names in (["coin"], ["never", "coin"]))
    assert one == two


def test_every_eval_loads_and_is_in_the_help():
    from ..commandline import run as command

    code, out, _ = command("eval", "--help")
    assert code == 0
    for name in suite.EVALS | suite.JUDGED:
        assert callable(suite.load_eval(name))
        assert f" {name} " in out or f" {name}," in out or f", {name} " in out


def test_probes_of_an_eval_use_one_thread_of_blas(trained, monkeypatch):
    folder, stream, _ = trained
    threads = lambda: {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    monkeypatch.setattr(suite, "coin", lambda evaluation: {"threads": sorted(threads()), "controls": {}})
    with threadpool_limits(2, user_api="blas"):
        assert evaluate(find(folder), stream, None, ["coin"])["coin"]["threads"] == [1]
        assert threads() == {2}


@pytest.mark.parametrize(("name", "missing"), [("sparse_probing", "scipy.sparse"), ("clusters", "sklearn.metrics")])
def test_a_package_that_is_missing_is_named(monkeypatch, name, missing):
    monkeypatch.delitem(sys.modules, f"temposae.evals.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    package = missing.partition(".")[0]
    with pytest.raises(UserError, match=rf"^eval: {name} needs {package}; pip install 'temposae\[evals\]'$"):
        suite.load_eval(name)
