"""The benchmark sae-probes on small folders laid out as the package's, with latents that tell the class, or nothing."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage.checkpoint import find
from temposae.engine.train import train
from temposae.evals import run_figures, suite
from temposae.evals.evaluation import Evaluation
from temposae.evals.kept_sets import KeptSets, SetResult
from temposae.evals.probe_sets import QUICK, is_probe_set, load, probe_sets, why_not_there
from temposae.evals.report_tables import section
from temposae.evals.run_evals import evaluate
from temposae.evals.sae_probes import CONTEXT, last_tokens, sae_probes
from temposae.evals.tuned_probes import split_rows
from temposae.kernels.code import SparseCode

from .probe_data import WORDS, by_length, noise, write_set

F = 8


class ByLength(SparseAutoencoder):
    """Latent 5 is 1 at tokens from position `first` on, so at a long text's last token; all others are 1 everywhere."""

    def __init__(self, first: int = 20, scale: float = 1.0, rest: float = 1.0):
        super().__init__(SAEConfig(d_in=128, d_sae=F, k=2))
        self.first, self.scale, self.rest = first, scale, rest

    def encode_sparse(self, x: torch.Tensor, pos: torch.Tensor) -> SparseCode:
        values = torch.full((len(x), F), self.rest)
        values[:, 5] = self.scale * (pos >= self.first)
        return SparseCode(values, torch.arange(F, dtype=torch.int32).expand(len(x), F).contiguous(), F)


def small(seed: int) -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=8), seed=seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with one set that the length tells, and one that nothing does."""
    folder = tmp_path_factory.mktemp("sae-probes")
    write_set(folder, "7_length", by_length(240))
    write_set(folder, "12_noise", noise(240))
    return folder


def test_a_latent_that_is_the_label_scores_one_and_permuted_labels_a_half(stream_of, data):
    evaluation = Evaluation(stream_of(), ByLength(), ByLength(first=0))
    result = sae_probes(evaluation, [f"7_length?path={data}"], ks=(1, 2))
    scores = result["sets"]["7_length"]
    assert scores["latents"][0] == 5
    for figure in ("auc", "accuracy", "f1"):
        assert result[figure] == scores[figure] == {"1": 1.0, "2": 1.0}
        assert result["controls"]["random"][figure] == pytest.approx(dict.fromkeys(("1", "2"), 0.5), abs=0.2)
    assert result["controls"]["random"]["auc"]["1"] == 0.5  # constant latents
    assert result["controls"]["shuffled"]["auc"]["1"] == pytest.approx(0.5, abs=0.16)  # 99 texts: 3 standard errors
    assert result["reached_by"] == scores["reached_by"] == []
    assert (scores["train_rows"], scores["test_rows"]) == (140, 99)
    assert scores["tokens"] == sum(1 + len(text.split()) for text, _ in by_length(240))
    above = result["intervals"]["auc"]["1"]
    assert (above["low"], above["high"]) == (pytest.approx(1 - 3 / 99), 1.0)
    assert above["above_random"]["low"] > 0.4
    assert above["above_llm"]["difference"] == pytest.approx(1 - result["llm"]["auc"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_control_that_scores_as_high_is_named(stream_of, data):
    evaluation = Evaluation(stream_of(), ByLength(), ByLength(first=21))
    assert "random" in sae_probes(evaluation, [f"7_length?path={data}"], ks=(1,))["reached_by"]


def test_dead_latents_have_no_score(stream_of, data):
    evaluation = Evaluation(stream_of(), ByLength(), ByLength(scale=0, rest=0))
    result = sae_probes(evaluation, [f"7_length?path={data}"], ks=(1,))
    assert result["warnings"] == ["7_length: random: no latent is active on any text"]
    assert result["controls"]["random"]["auc"] == {"1": None}
    assert result["intervals"]["auc"]["1"]["above_random"] is None
    assert result["auc"]["1"] == 1.0
    dead = sae_probes(
        Evaluation(stream_of(), ByLength(scale=0, rest=0), ByLength()), [f"7_length?path={data}"], ks=(1,)
    )
    assert dead["auc"] == dead["controls"]["shuffled"]["auc"] == {"1": None}
    assert dead["intervals"] == {"auc": {}}
    assert dead["reached_by"] == []


def test_means_are_over_sets_and_texts_are_drawn_within_each(stream_of, data):
    evaluation = Evaluation(stream_of(), ByLength(), None, sets=(f"all?path={data}", "topic"))
    result = sae_probes(evaluation, ks=(1,), penalty="l2")
    assert list(result["sets"]) == ["7_length", "12_noise"]  # by number
    of_sets = [scores["auc"]["1"] for scores in result["sets"].values()]
    assert of_sets == [1.0, 0.5]  # without length every latent is constant
    assert result["auc"]["1"] == 0.75
    # one has no spread, and the other's latents are constant: the rule of three for 198 texts
    interval = result["intervals"]["auc"]["1"]
    assert (interval["low"], interval["high"]) == pytest.approx((0.75 - 3 / 198, 0.75 + 3 / 198))
    assert interval["items"] == 198
    assert result["protocol"]["penalty"] == "l2"


def test_the_last_token_is_read_of_every_text(stream_of):
    """Whatever the batches; in front of long texts `<bos>` stays, and the end is kept."""
    stream = stream_of()
    draw = np.random.default_rng(3)
    texts = [" ".join(draw.choice(WORDS, size=size)) for size in draw.integers(1, 90, size=21)]
    texts.append(" ".join([*["soup"] * 500, "star"]))
    evaluation = Evaluation(stream, small(1), small(2))
    x, latents, _ = last_tokens(evaluation, texts, "texts")
    tokenizer, context = stream.model.tokenizer, min(CONTEXT, stream.model.context)
    for row, text in enumerate(texts):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"][-(context - 1) :]]
        alone = stream.model.activations(torch.tensor([ids]))[0, -1]
        torch.testing.assert_close(torch.from_numpy(x[row]), alone, rtol=1e-4, atol=1e-4)
        code = evaluation.sae.encode_sparse(alone[None], torch.tensor([len(ids) - 1])).to_dense()[0]
        found = torch.from_numpy(latents["sae"][[row]].toarray()[0])
        torch.testing.assert_close(found, code.detach(), rtol=1e-3, atol=1e-3)
    assert set(latents) == {"sae", "random", "lm_neurons"}


def test_a_mask_over_positions_limits_the_context(stream_of, data):
    stream = stream_of(context=32)
    mask = {"kind": "ranges", "positions": 32}
    sae = SparseAutoencoder(SAEConfig.model_validate({"d_in": 128, "d_sae": 64, "k": 8, "mask": mask}))
    found = sae_probes(Evaluation(stream, sae, None), [f"7_length?path={data}"], ks=(1,))
    assert found["protocol"]["context_length"] == 32
    plain = sae_probes(Evaluation(stream, small(0), None), [f"7_length?path={data}"], ks=(1,))
    assert plain["protocol"]["context_length"] == min(CONTEXT, stream.model.context)


def test_a_measurement_goes_on_after_the_sets_that_it_has(stream_of, data, tmp_path, monkeypatch):
    stream, sets = stream_of(), [f"all?path={data}"]
    measured = []

    def counted(evaluation, texts, title):
        measured.append(title)
        return last_tokens(evaluation, texts, title)

    monkeypatch.setattr("temposae.evals.sae_probes.last_tokens", counted)

    def run(key: str = "a", *, fresh: bool = False, chosen: list[str] = sets, ks: tuple[int, ...] = (1,)) -> dict:
        evaluation = Evaluation(stream, small(1), small(2))
        evaluation.kept_sets = KeptSets(tmp_path, {"dictionary": key}, fresh=fresh)
        measured.clear()
        return sae_probes(evaluation, chosen, ks=ks, penalty="l2")

    first = run(chosen=[f"7_length?path={data}"])
    assert measured == ["7_length (1 of 1)"]
    whole = run()
    assert measured == ["12_noise (2 of 2)"]
    assert run() == whole
    assert measured == []
    assert whole["sets"]["7_length"] == first["sets"]["7_length"]
    again = run(fresh=True)
    assert len(measured) == 2
    assert again == whole
    for changed in ({"key": "b"}, {"ks": (2,)}, {"chosen": [f"all?path={data}&texts=200"]}):
        run(**changed)
        assert len(measured) == 2, changed
    (tmp_path / "7_length.json").write_text("{")  # cut short
    run(**changed)
    assert measured == ["7_length (1 of 2)"]


def test_a_run_keeps_the_result_of_each_set(stream_of, data, tmp_path, monkeypatch):
    """After an interruption, `--fresh` alone measures them again."""
    monkeypatch.setattr(suite, "NEEDS", {})  # the embedded model will do
    stream, sets = stream_of(), [f"7_length?path={data}"]
    run = tmp_path / "run"
    train(stream, SAEConfig(d_in=128, d_sae=32, k=2), TrainConfig(tokens=1024, batch=256), out=run)
    first = evaluate(find(run), stream, run, ["sae_probes"], sets=sets)["sae_probes"]
    assert [path.name for path in (run / "evals" / "sae_probes").iterdir()] == ["7_length.json"]
    assert "7_length" in (run / "report.md").read_text()
    (run / "evals" / "sae_probes.json").unlink()
    monkeypatch.setattr("temposae.evals.sae_probes._measured", lambda *_: pytest.fail("measured again"))
    again = evaluate(find(run), stream, run, ["sae_probes"], sets=sets)["sae_probes"]
    assert again["auc"] == first["auc"]
    assert again["intervals"] == first["intervals"]
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        evaluate(find(run), stream, run, ["sae_probes"], sets=sets, fresh=True)


def test_kept_scores_are_the_same_bits(tmp_path):
    draws = {"16": {"sae": np.random.default_rng(0).random(1000).astype(np.float32)}}
    kept = KeptSets(tmp_path / "sets", {"seed": 0})
    kept.write("a", {}, SetResult({"auc": {"1": 0.1}}, draws))
    found = kept.read("a", {})
    assert found is not None
    assert found.scores == {"auc": {"1": 0.1}}
    assert np.array_equal(found.draws["16"]["sae"], draws["16"]["sae"])


def test_the_tables_and_the_figure_have_every_score(stream_of, data):
    result = sae_probes(Evaluation(stream_of(), small(1), small(2)), [f"all?path={data}"], ks=(1, 16))
    text = "\n".join(section("sae_probes", result))
    for scores in (result, *result["sets"].values()):
        for value in (scores["auc"]["16"], scores["controls"]["random"]["auc"]["16"], scores["llm"]["auc"]):
            assert f"{value:.4f}" in text
        above = scores["intervals"]["auc"]["16"]["above_llm"]
        assert f"{above['difference']:+.3f} ({above['low']:+.3f} to {above['high']:+.3f})" in text
    figure = run_figures._sae_probes(result)["sae_probes"]
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 2}
    assert lines["dictionary"] == list(result["auc"].values())
    assert lines["LM activations"] == [result["llm"]["auc"]] * 2


def test_rows_are_drawn_evenly_and_once():
    for n, seed in ((240, 0), (1388, 42), (5000, 2**40)):
        y = np.random.default_rng(n).permutation(np.arange(n) % 2 == 1)
        train, test = split_rows(y, seed)
        assert len(train) == min(n - 100, 1024)
        assert len(train) + len(test) == n - 1
        assert len(np.unique(np.concatenate([train, test]))) == n - 1
        assert y[train].mean() == 0.5
    with pytest.raises(UserError, match="^labels: 20 of 240 rows are in the second class; half of them must be$"):
        split_rows(np.arange(240) < 20, 0)


def test_names_of_data_sets(data):
    assert [s.name for s in probe_sets([f"all?path={data}"])] == ["7_length", "12_noise"]
    named = ("quick", "all?texts=300", "24_headline_isiran", "131_temp_cat_Typical Time")
    assert all(is_probe_set(name) for name in named)
    assert not any(
        is_probe_set(name) for name in ("topic", "7_a.csv", "a/7_length", "fancyzhx/ag_news?path=all", "reviews")
    )
    assert len(QUICK) == 9
    for source, message in (
        (
            f"7_lengths?path={data}",
            "^--set: '7_lengths' is not allowed; it is no data set of sae-probes; did you mean 7_len",
        ),
        (f"quick?path={data}", "^--set: quick is not allowed; the folder has none of 24_headline"),
        (f"7_length?path={data}&rows=3", "has no option 'rows'; allowed are texts, path$"),
        (f"7_length?path={data}&texts=20", "^--set: texts = '20' is not allowed; it must be a number of at least 200$"),
        (f"all?path={data.parent}/absent", "is not allowed; it holds no data of sae-probes"),
    ):
        with pytest.raises(UserError, match=message):
            probe_sets([source])
    with pytest.raises(UserError, match="^--set: 7_length is given twice, with other options; give each set once$"):
        probe_sets([f"all?path={data}", f"7_length?path={data}&texts=220"])


def test_fewer_texts_are_drawn_evenly(data):
    (one,) = probe_sets([f"7_length?path={data}&texts=220"])
    labelled = load(one, np.random.default_rng(0))
    assert [labelled.labels.count(label) for label in ("long", "short")] == [110, 110]
    assert set(zip(labelled.texts, labelled.labels, strict=True)) <= set(by_length(240))


def test_files_that_do_not_fit_are_named(tmp_path):
    write_set(tmp_path, "1_few", by_length(150))
    write_set(tmp_path, "2_three", [(text, str(i % 3)) for i, (text, _) in enumerate(by_length(240))])
    write_set(tmp_path, "3_columns", by_length(240), ("text", "label"))
    for name, message in (
        ("1_few", "150 texts are too few; at least 200 are needed"),
        ("2_three", "has 3 classes; it must have two"),
        ("3_columns", "has no column 'prompt'; it needs prompt and target"),
    ):
        with pytest.raises(UserError, match=message):
            load(probe_sets([f"{name}?path={tmp_path}"])[0], np.random.default_rng(0))


def test_the_package_s_files_are_found_and_read_without_importing_it(tmp_path, monkeypatch):
    """A compressed file beside the package's table, which says which sets have two classes."""
    import pyarrow

    package = tmp_path / "sae_probes"
    write_set(package, "7_length", by_length(240))
    write_set(package, "8_place", by_length(240))
    (package / "__init__.py").write_text("raise ImportError('it was imported')")
    table = [("Dataset save name", "Data type"), ("cleaned_data/7_length.csv", "Binary Classification")]
    table.append(("cleaned_data/8_place.csv", "Continuous Data"))
    with (package / "data" / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    for file, target in (
        ("cleaned_data/7_length.csv", "cleaned_data/7_length.csv.zst"), ("table.csv", "probing_datasets_MASTER.csv.zst")
    ):  # fmt: skip
        with pyarrow.CompressedOutputStream(str(package / "data" / target), "zstd") as out:
            out.write((package / "data" / file).read_bytes())
        (package / "data" / file).unlink()
    monkeypatch.setattr("temposae.evals.probe_sets.find_spec", lambda name: None)
    assert why_not_there([]) == (
        "its data is not installed; pip install --no-deps sae-probes, or name a copy of the package, --set quick?path=FOLDER"
    )
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = probe_sets(["all"])
    assert found.name == "7_length"
    assert load(found, np.random.default_rng(0)).texts == [text for text, _ in by_length(240)]


def test_the_command_line_says_which_eval_reads_a_set(data):
    suite.check_there([f"all?path={data}", "topic"], {}, ["sparse_probing", "sae_probes"])
    for names, source, message in (
        (["sparse_probing"], f"all?path={data}", "is not allowed with eval sparse_probing; only sae_probes reads it$"),
        (
            ["sae_probes"],
            "topic",
            "^--set: 'topic' is not allowed with eval sae_probes; it must be quick, all, or a name",
        ),
    ):
        with pytest.raises(UserError, match=message):
            suite.check_there([source], {}, names)


def test_it_needs_a_model_of_english(stream_of, data):
    stream, sae = stream_of(), SAEConfig(d_in=128, d_sae=8, k=2)
    needs = suite.missing_inputs("sae_probes", stream, sae, [f"all?path={data}"], {})
    assert needs == {"": "the embedded model reads only its own language; this eval needs a model of English (--model)"}
    assert list(suite.input_digests("sae_probes", [f"all?path={data}", "topic"], {})) == [f"all?path={data}"]
    assert suite.input_digests("sparse_probing", ["all", "topic"], {}) == {"topic": None}
