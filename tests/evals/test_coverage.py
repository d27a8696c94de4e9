"""The list at the end of `eval all`, and main scores in the tables of a command."""

from pathlib import Path

from temposae.cli.output import scores_table
from temposae.evals.coverage import not_measured, summary
from temposae.evals.report_tables import main_scores

from ..commandline import run

RESULTS = {
    "core": {"l0": 2.0, "controls": {}},
    "sparse_probing": {"skipped": "t.txt has no labels; give labelled texts, --set FILE"},
    "positions": {"order_probing": {"skipped": "m has no tokenizer"}, "fidelity": {"profile": 1.0}, "slicing": None},
}


def test_the_list_names_what_was_measured_and_the_option_for_the_rest():
    assert summary(RESULTS) == [
        "measured: core, positions",
        "not measured, and what supplies it:",
        "  sparse_probing            t.txt has no labels; give labelled texts, --set FILE",
        "  positions, order probing  m has no tokenizer",
    ]
    assert list(not_measured(RESULTS)) == ["sparse_probing", "positions, order probing"]
    assert summary({"core": RESULTS["core"]}) == ["measured: core"]
    assert summary({"scr": {"skipped": "no"}})[0] == "measured: nothing"


def test_eval_all_on_a_text_without_labels_ends_with_the_list(texts, tmp_path: Path):
    """Core, positions with word order, clusters, absorption, mdl and meta structure need nothing; others name an option."""
    (tmp_path / "own.txt").write_text("\n\n".join(texts * 8))
    folder = tmp_path / "run"
    small = ("--d-sae", 32, "--k", 4, "--tokens", 4096, "--data", tmp_path / "own.txt", "--no-eval", "--out", folder)
    assert run("train", *small).code == 0
    code, out, _ = run("eval", "all", "--sae", folder)
    assert code == 0
    measured, *rest = out.split("\nmeasured: ")[1].splitlines()
    assert {"core", "positions", "clusters", "mdl", "meta_structure"} <= set(measured.split(", "))
    lines = rest[1 : next(i for i, line in enumerate(rest) if line.startswith("report: "))]
    named = {line.strip().partition("  ")[0]: line for line in lines}
    for name, option in (("sparse_probing", "--set "), ("unlearning", "--file "), ("ground_truth", "--model testbed")):
        assert option in named[name]
    assert "positions, order probing" not in named
    page = (folder / "report.md").read_text()
    assert "swapped words" in page


def test_nested_main_scores_are_in_the_table(capsys):
    result = {
        "within": 0.25, "stability": {"adjusted_rand": 0.75, "spread": 0.1},
        "controls": {"random": {"stability": {"adjusted_rand": 0.5}}, "shuffled": {"stability": None}},
    }  # fmt: skip
    scores_table(result, "title", main_scores("clusters", result))
    line = next(line for line in capsys.readouterr().out.splitlines() if "adjusted rand" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["stability adjusted rand", "0.7500", "0.5000", "-"]
