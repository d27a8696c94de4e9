"""Figures of a campaign: what is drawn is what its saved numbers say."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata
from temposae.campaign import figures, log_figures, overview, position_figures
from temposae.campaign.figure_panels import DrawnFigure
from temposae.campaign.figures import draw, missing
from temposae.campaign.seed_results import CampaignResults
from temposae.engine.errors import UserError
from temposae.reporting.plots import DPI

from .. import commandline
from . import made_up
from .made_up import EVERY, STEPS, T, numbers

SEEDS = range(2)
RUNS = {
    "A1": "hard masks", "A3": "soft masks, strong sparsity", "B4": "clipped, slow", "B9": "hierarchical adaptation",
    "B10": "curriculum", "C2": "temperature annealing", "C4": "position-wise loss picture", "C5": "adaptive weights",
    "C6": "position-dependent sparsity", "C9": "temporal clustering", "E1": "dynamic margin", "E4": "causal routing",
}  # fmt: skip
NAMED = [
    "log_a/unlearning_scores", "log_a/loss_curves", "log_a/final_metrics",
    "log_b/training_progression", "log_b/hyperparameters",
    "log_c/position_analysis", "log_c/position_weights", "log_c/sparsity_analysis", "log_c/temporal_clustering",
    "log_c/cluster_patterns", "log_c/comparative_analysis",
    "log_e/unlearning_scores", "log_e/training_curves", "log_e/feature_statistics",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.campaign(tmp_path_factory.mktemp("campaign"), RUNS, seeds=len(SEEDS), failed=("E4-s0", "E4-s1"))


@pytest.fixture(scope="module")
def saved(folder: Path) -> CampaignResults:
    return CampaignResults(folder)


def of(run: str, name: str) -> list[float]:
    return [numbers(run, seed)[name] for seed in SEEDS]


def fvu(run: str) -> list[float]:
    return [1 - value for value in of(run, "explained_variance")]


def named(axes: Any, gid: str) -> Any:
    (found,) = [artist for artist in axes.get_children() if artist.get_gid() == gid]
    return found


def bar(axes: Any, run: str) -> float:
    """How long a bar is."""
    return named(axes, run).get_width()


def whiskers(axes: Any) -> list[tuple[float, float]]:
    """The ends of every error bar: up and down, or left and right where bars lie."""
    from matplotlib.container import ErrorbarContainer

    found = []
    for each in axes.containers:
        if isinstance(each, ErrorbarContainer):
            (segment,) = each[2][0].get_segments()
            across = each.has_xerr
            found.append(tuple(segment[:, 0 if across else 1]))
    return found


def cells(axes: Any) -> np.ndarray:
    """What a heat map shows."""
    (mesh,) = [artist for artist in axes.collections if hasattr(artist, "get_coordinates")]
    return np.ma.filled(mesh.get_array(), np.nan)


def panel(drawing: DrawnFigure, title: str) -> Any:
    (found,) = [axes for axes in drawing.figure.axes if axes.get_title().startswith(title)]
    return found


def texts(axes: Any) -> list[str]:
    return [text.get_text().strip() for text in axes.texts]


def test_every_figure_that_the_logs_name_is_written(folder: Path):
    drawn = draw(folder)
    assert [path.relative_to(folder / "figures").as_posix() for path in drawn] == [
        "overview.png", *(f"{name}.png" for name in NAMED)
    ]  # fmt: skip
    assert sum(map(len, figures.NAMED.values())) == 14
    assert len({path.name for path in drawn if path.parent.name != "figures"}) == 13
    assert missing(folder) == {}
    for path in drawn:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width in (5.2 * DPI, 7 * DPI)
        assert 1.2 * DPI < height < 6.5 * DPI
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("log", ["A", "E"])
def test_unlearning_scores_are_bars_with_their_controls_and_spread(saved: CampaignResults, log: str):
    (axes,) = log_figures.unlearning_scores(saved, log).figure.axes
    ends = whiskers(axes)
    for run in ("relu", "topk", *({"A": ("A1", "A3"), "E": ("E1",)}[log])):
        own, random = of(run, "unlearning"), of(run, "random unlearning")
        assert bar(axes, run) == pytest.approx(np.mean(own))
        assert named(axes, f"{run} random").get_xdata() == pytest.approx(np.mean(random))
        for values in (own, random):
            assert any(end == pytest.approx((min(values), max(values))) for end in ends)
    assert ("failed" in texts(axes)) == (log == "E")
    assert [label.get_text() for label in axes.get_yticklabels()][:4] == [
        "ReLU + L1", "TopK", "BatchTopK", "A1 hard masks" if log == "A" else "E1 dynamic margin"
    ]  # fmt: skip


@pytest.mark.parametrize(("log", "runs"), [("A", ["A1", "A3"]), ("E", ["E1"])])
def test_curves_are_the_mean_of_the_seeds_on_held_out_text_with_a_band(
    saved: CampaignResults, log: str, runs: list[str]
):
    (axes,) = log_figures.training_curves(saved, log).figure.axes
    assert [line.get_gid() for line in axes.lines] == ["relu", "topk", "batchtopk", *runs]
    bands = {tuple(one.get_facecolor()[0][:3]): one for one in axes.collections}
    assert len(axes.collections) == 3 + len(runs)
    for run in runs:
        curves = np.array([[value for _, value in made_up.curve(run, seed)] for seed in SEEDS])
        line = named(axes, run)
        assert line.get_xdata().tolist() == list(range(0, STEPS + 1, EVERY))
        assert line.get_ydata() == pytest.approx(curves.mean(0))
        from matplotlib.colors import to_rgb

        corners = bands[to_rgb(line.get_color())].get_paths()[0].vertices
        assert corners[:, 1].min() == pytest.approx(curves.min())
        at_last = corners[corners[:, 0] == STEPS][:, 1]
        assert (at_last.min(), at_last.max()) == pytest.approx((curves[:, -1].min(), curves[:, -1].max()))
    assert "held-out" in axes.get_ylabel()
    assert {"relu", *runs} <= set(texts(axes))  # named at their ends


def test_names_at_the_ends_of_lines_do_not_lie_on_each_other(folder: Path):
    (axes,) = log_figures.training_curves(CampaignResults(folder), "A").figure.axes
    places = sorted(note.xyann[1] for note in axes.texts)
    assert np.diff(places).min() > 0.03


def test_final_errors_are_bars_with_their_numbers(saved: CampaignResults):
    (axes,) = log_figures.final_metrics(saved, "A").figure.axes
    for run in ("batchtopk", "A1", "A3"):
        assert bar(axes, run) == pytest.approx(np.mean(fvu(run)))
        assert f"{np.mean(fvu(run)):.3f}"[1:] in texts(axes)
        assert any(end == pytest.approx((min(fvu(run)), max(fvu(run)))) for end in whiskers(axes))
    (legend,) = log_figures.final_metrics(saved, "A").figure.legends
    assert "mean of 2 seeds (fewer where some failed)" in legend.get_title().get_text()


def test_a_bar_far_worse_than_the_mean_is_cut_and_told_in_figures(folder: Path):
    saved = CampaignResults(folder)
    saved.logs["A"]["A3"]["scores"]["explained_variance"]["values"] = [-4.5, -2.5]
    (axes,) = log_figures.final_metrics(saved, "A").figure.axes
    assert axes.get_xlim()[1] < 0.25
    assert "4.5 →" in texts(axes)


def test_progression_of_log_b_has_steps_and_errors(saved: CampaignResults):
    drawing = log_figures.training_progression(saved, "B")
    steps, error = panel(drawing, "Steps"), panel(drawing, "Error")
    for run in ("relu", "B4", "B9", "B10"):
        assert bar(steps, run) == STEPS
        assert bar(error, run) == pytest.approx(np.mean(fvu(run)))
    assert named(steps, "steps planned").get_xdata().tolist() == [STEPS] * 6
    standing_out = {run: named(error, run).get_facecolor() for run in ("B4", "B9", "B10")}
    assert standing_out["B9"] == standing_out["B10"] != standing_out["B4"]


def test_a_run_that_failed_shows_how_far_it_came(tmp_path: Path):
    out = made_up.campaign(tmp_path, {"B9": "hierarchical adaptation", "B10": "curriculum"}, failed=("B10",))
    metrics = out / "runs" / "B10" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    drawing = log_figures.training_progression(CampaignResults(out), "B")
    assert bar(panel(drawing, "Steps"), "B10") == 3 * EVERY
    assert texts(panel(drawing, "Error")).count("failed") == 1


def test_hyperparameters_of_log_b_are_those_of_the_settings_and_of_the_run(saved: CampaignResults):
    drawing = log_figures.hyperparameters(saved, "B")
    rates, penalties = panel(drawing, "Learning rate"), panel(drawing, "Sparsity")
    assert {run: named(rates, run).get_xdata()[0] for run in ("relu", "topk", "B4", "B10")} == {
        "relu": 3e-4, "topk": 3e-4, "B4": 3e-5, "B10": 3e-4
    }  # fmt: skip
    assert named(rates, "of its adapters").get_xdata() == pytest.approx([0.3 * 3e-4])
    assert named(penalties, "B4").get_xdata()[0] == 0.04
    assert not [line for line in penalties.lines if line.get_gid() == "topk"]  # it has no L1
    assert named(penalties, "while its base is alone").get_xdata() == pytest.approx([0.5 * 0.04])
    ends = named(penalties, "at the end, adjusted to the target L0").get_xdata()
    assert ends == pytest.approx([0.04 * (1 + STEPS / 10)] * 4)  # relu and three runs


def test_sizes_of_log_e_are_beside_latents_alive(saved: CampaignResults):
    (axes,) = log_figures.feature_statistics(saved, "E").figure.axes
    assert list(named(axes, "d_sae").get_xdata()) == [made_up.F] * 5
    alive = named(axes, "alive").get_offsets()
    assert alive[:, 1].tolist() == [0, 1, 2, 3]  # not E4, which failed
    wanted = [made_up.F * (1 - np.mean(of(run, "dead_fraction"))) for run in ("relu", "topk", "batchtopk", "E1")]
    assert alive[:, 0].tolist() == pytest.approx(wanted)
    assert len(whiskers(axes)) == 4


def by_position(run: str, step: int) -> np.ndarray:
    return np.array([made_up.by_position(run, seed, T, step) for seed in SEEDS])


def test_position_analysis_shows_losses_and_masks_of_c2(saved: CampaignResults):
    drawing = position_figures.position_analysis(saved)
    assert drawing.lacks == ()
    losses = np.stack([by_position("C2", step).mean(0) for step in range(EVERY, STEPS + 1, EVERY)])
    np.testing.assert_allclose(cells(panel(drawing, "Loss by position")), losses.T)
    end = panel(drawing, "At the end")
    last = by_position("C2", STEPS)
    np.testing.assert_allclose(named(end, "C2").get_ydata(), last.mean(0))
    (band,) = end.collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(np.nanmax(last))
    masks = cells(panel(drawing, "Mask"))
    np.testing.assert_allclose(masks[:, -1], 0.5 + 0.4 * np.sin(np.arange(T) / 2))
    assert "C2's loss has no weights" in panel(drawing, "Mask").get_title()


def test_position_weights_shows_how_those_of_c6_converge_and_what_they_follow(saved: CampaignResults):
    drawing = position_figures.position_weights(saved)
    steps = range(EVERY, STEPS + 1, EVERY)
    weights = np.array([[made_up.weights("C6", seed, T, step) for step in steps] for seed in SEEDS])
    np.testing.assert_allclose(cells(panel(drawing, "Weights over")), weights.mean(0).T)
    distance = named(panel(drawing, "Distance"), "distance")
    assert distance.get_xdata().tolist() == list(steps)[:-1]
    apart = np.abs(weights - weights[:, -1:]).mean(2).mean(0)
    np.testing.assert_allclose(distance.get_ydata(), apart[:-1])
    scatter = panel(drawing, "Weight and")
    error, weight = by_position("C6", STEPS).mean(0)[1:], weights[:, -1].mean(0)[1:]
    np.testing.assert_allclose(scatter.collections[0].get_offsets(), np.stack([error, weight], 1))
    rho = np.corrcoef(rankdata(error), rankdata(weight))[0, 1]
    assert f"ρ = {rho:.2f}" in scatter.get_title()


def clusters(folder: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    result = json.loads((folder / "runs" / "C6-s0" / "evals" / "clusters.json").read_text())
    return result, *(np.array(result["sample"][key]) for key in ("profiles", "cluster"))


def test_sparsity_analysis_shows_l0_and_latents_of_c6(folder: Path, saved: CampaignResults):
    drawing = position_figures.sparsity_analysis(saved)
    l0 = lambda step, seed: 4 + np.sin(np.arange(1, T) / 3) + step / 100 + seed / 10
    shown = cells(panel(drawing, "Sparsity"))
    assert shown.shape == (T, STEPS // EVERY)
    assert np.isnan(shown[0]).all()  # where there are no tokens
    np.testing.assert_allclose(shown[1:, 2], l0(3 * EVERY, 0.5))
    np.testing.assert_allclose(named(panel(drawing, "At the end"), "C6").get_ydata()[1:], l0(STEPS, 0.5))
    _, profiles, _ = clusters(folder)
    active = cells(panel(drawing, "Where"))
    middles = active @ np.arange(16)
    assert (np.diff(middles) >= 0).all()
    np.testing.assert_array_equal(np.sort(active, axis=0), np.sort(profiles, axis=0))


def test_clustering_shows_each_latent_once_under_its_tree(folder: Path, saved: CampaignResults):
    tree, strip, heat, _ = position_figures.temporal_clustering(saved).figure.axes
    _, profiles, cluster = clusters(folder)
    sorted_by_tree = cells(heat).T
    order = [int(np.flatnonzero((profiles == row).all(1))[0]) for row in sorted_by_tree]
    assert sorted(order) == list(range(len(profiles)))
    assert cells(strip)[0].tolist() == cluster[order].tolist()
    assert (np.diff(cluster[order]) != 0).sum() == 2  # three clusters far apart, each a branch of its own
    (links,) = tree.collections
    assert len(links.get_segments()) == len(profiles) - 1
    p, q = profiles[order[0]], profiles[order[1]]
    m = (p + q) / 2
    js = np.sqrt((p * np.log2(p / m)).sum() / 2 + (q * np.log2(q / m)).sum() / 2)
    (first,) = [link for link in links.get_segments() if {0.5, 1.5} <= set(link[:, 0])]  # merges the first two leaves
    assert first[:, 1].max() == pytest.approx(js)


def test_patterns_of_clusters_are_those_of_the_result(folder: Path, saved: CampaignResults):
    result, _, _ = clusters(folder)
    drawing = position_figures.cluster_patterns(saved)
    profiles, likeness, special = (panel(drawing, title) for title in ("Mean", "Likeness", "Specialization"))
    for at, of_cluster in enumerate(result["clusters"], 1):
        assert list(named(profiles, f"cluster {at}").get_ydata()) == of_cluster["profile"]
    image = np.ma.filled(likeness.images[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(image, np.array(result["correlation"], dtype=float))
    medians = [
        line.get_ydata()[0] for line in special.lines if line.get_color() == "black" and len(line.get_xdata()) == 2
    ]
    assert {0.3, 0.4, 0.5} <= {round(median, 6) for median in medians}


def test_comparison_of_log_c_has_errors_sparsity_and_weights(saved: CampaignResults):
    drawing = position_figures.comparative_analysis(saved)
    error, sparsity = (axes for axes in drawing.figure.axes if axes.get_title() in ("Error", "Sparsity"))
    for run in ("relu", "C2", "C5", "C6"):
        assert bar(error, run) == pytest.approx(np.mean(fvu(run)))
        assert bar(sparsity, run) == pytest.approx(np.mean(of(run, "l0")))
    assert [label.get_text() for label in error.get_yticklabels()] == ["relu", "topk", "batchtopk", "C2", "C5", "C6"]
    where = panel(drawing, "Error by")
    shown = cells(where)
    assert [label.get_text() for label in where.get_yticklabels()] == ["relu", "topk", "batchtopk", "C2", "C5", "C6"]
    np.testing.assert_allclose(shown[-1], by_position("C6", STEPS).mean(0) / 300)
    weights = panel(drawing, "Weights")
    assert [line.get_gid() for line in weights.lines if line.get_gid()] == ["C5", "C6"]  # C2's are all 1
    ends = np.mean([made_up.weights("C6", seed, T, STEPS) for seed in SEEDS], 0)
    np.testing.assert_allclose(named(weights, "C6").get_ydata(), ends)


def test_overview_has_every_run_beside_its_control(folder: Path):
    (axes,) = overview.overview(CampaignResults(folder)).figure.axes
    for run in ("relu", "A1", "B10", "C6", "E1"):
        own, random = of(run, "explained_variance"), of(run, "random explained_variance")
        assert named(axes, run).get_xdata() == pytest.approx(np.mean(own))
        assert named(axes, f"{run} random").get_xdata() == pytest.approx(np.mean(random))
        for values in (own, random):
            assert any(end == pytest.approx((min(values), max(values))) for end in whiskers(axes))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "C2 temperature annealing (C4)" in labels
    assert len(labels) == 3 + 10  # analyses have no weights of their own
    assert "failed" in texts(axes)


def test_overview_marks_runs_that_are_no_better_than_their_control_and_keeps_its_scale(folder: Path):
    saved = CampaignResults(folder)
    saved.logs["A"]["A1"]["scores"]["explained_variance"]["values"] = [0.1, 0.2]
    saved.logs["A"]["A3"]["scores"]["explained_variance"]["values"] = [-7.0, -7.2]
    (axes,) = overview.overview(saved).figure.axes
    assert named(axes, "A1 gap").get_color() == named(axes, "A3 gap").get_color() != named(axes, "B4 gap").get_color()
    assert "-7.1" in texts(axes)
    assert axes.get_xlim()[0] == overview.LEAST


def test_conditions_are_apart_and_log_figures_show_the_first(tmp_path: Path):
    out = made_up.campaign(tmp_path, {"A1": "hard masks", "E1": "dynamic margin"}, conditions=("l0-16", "l0-32"))
    results = json.loads((out / "campaign.json").read_text())
    results["runs"]["A1-l0-32"]["scores"]["explained_variance"]["values"] = [0.5]
    results["runs"]["A1-l0-32"]["scores"]["l0"]["values"] = [32.0]
    (out / "campaign.json").write_text(json.dumps(results))
    (axes,) = log_figures.final_metrics(CampaignResults(out), "A").figure.axes
    assert bar(axes, "A1") == pytest.approx(1 - numbers("A1", 0)["explained_variance"])
    (axes,) = overview.conditions(CampaignResults(out)).figure.axes
    first, second = (line for line in axes.lines if line.get_gid() == "A1")
    assert (second.get_xdata()[0], second.get_ydata()[0]) == (32, 0.5)
    assert first.get_xdata()[0] == numbers("A1", 0)["l0"]
    assert first.get_marker() != second.get_marker()
    (other,) = {line.get_color() for line in axes.lines if line.get_gid() == "E1"}
    assert first.get_color() == second.get_color() != other
    assert "conditions.png" in [path.name for path in draw(out)]
    for run in (results["runs"] | results["baselines"]).values():  # the same for all: then runs stand side by side
        run["scores"]["l0"]["values"] = [16.0]
    (out / "campaign.json").write_text(json.dumps(results))
    (axes,) = overview.conditions(CampaignResults(out)).figure.axes
    places = {line.get_gid(): line.get_xdata()[0] for line in axes.lines if line.get_gid()}
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert {gid: names[round(at)] for gid, at in places.items()} == {
        gid: gid for gid in ("relu", "topk", "batchtopk", "A1", "E1")
    }


def test_one_seed_has_no_spread(tmp_path: Path):
    saved = CampaignResults(made_up.campaign(tmp_path, {"A1": "hard masks"}))
    figure = log_figures.unlearning_scores(saved, "A").figure
    assert whiskers(figure.axes[0]) == []
    assert not figure.legends[0].get_title().get_text()
    assert not log_figures.training_curves(saved, "A").figure.axes[0].collections


def test_what_was_not_measured_is_named_and_not_drawn(tmp_path: Path):
    runs = {"A1": "hard masks", "C4": "position-wise loss picture"}
    out = made_up.campaign(tmp_path, runs, evals=("core",), tracked=False)
    stale = out / "figures" / "log_a" / "unlearning_scores.png"
    stale.parent.mkdir(parents=True)
    stale.write_text("of other numbers")
    drawn = {path.relative_to(out / "figures").as_posix() for path in draw(out)}
    assert drawn == {
        "overview.png", "log_a/loss_curves.png", "log_a/final_metrics.png", "log_c/comparative_analysis.png"
    }  # fmt: skip
    assert not stale.exists()
    why = missing(out)
    assert set(why) == {
        "log_a/unlearning_scores.png", "log_c/comparative_analysis.png",
        *(f"{name}.png" for name in NAMED if name.startswith("log_c") and "comparative" not in name),
    }  # fmt: skip
    assert why["log_a/unlearning_scores.png"].startswith("not drawn: unlearning was not measured")
    assert "train.log_positions" in why["log_c/position_analysis.png"]
    assert "position_tracker" in why["log_c/position_analysis.png"]
    assert why["log_c/position_weights.png"] == "not drawn: it shows C6, which this campaign has not trained"
    assert why["log_c/comparative_analysis.png"].startswith("drawn without weights by position: no run")


def test_a_panel_without_numbers_is_left_out_and_named(tmp_path: Path):
    out = made_up.campaign(tmp_path, {"C6": "position-dependent sparsity"}, evals=("core",))
    drawing = position_figures.sparsity_analysis(CampaignResults(out))
    assert [axes.get_title() for axes in drawing.figure.axes if axes.get_title()] == [
        "Sparsity by position, C6", "At the end of training"
    ]  # fmt: skip
    assert drawing.lacks == ("latents by position: clusters was not measured of C6",)


def test_without_held_out_rows_curves_are_of_new_batches(tmp_path: Path):
    out = made_up.campaign(tmp_path, {"A1": "hard masks"})
    for path in out.rglob("held_out.jsonl"):
        path.unlink()
    (axes,) = log_figures.training_curves(CampaignResults(out), "A").figure.axes
    assert axes.get_ylabel() == "FVU on unseen batches"
    assert set(named(axes, "A1").get_ydata()) == {numbers("A1", 0)["fvu_last"] * 1.1}


def test_an_analysis_alone_shows_the_run_that_it_looks_at(tmp_path: Path):
    out = made_up.campaign(tmp_path, {"C4": "position-wise loss picture"})
    (axes,) = overview.overview(CampaignResults(out)).figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "C2 temperature annealing (C4)"
    assert position_figures.position_analysis(CampaignResults(out)).lacks == ()


def test_figures_of_scores_need_campaign_json_alone(tmp_path: Path):
    out = made_up.campaign(tmp_path, {"A1": "hard masks", "C2": "temperature annealing"})
    shutil.rmtree(out / "runs")
    drawn = {path.relative_to(out / "figures").as_posix() for path in draw(out)}
    assert {"overview.png", "log_a/unlearning_scores.png", "log_a/final_metrics.png"} <= drawn
    reason = "not drawn: the campaign's folder has no runs/"
    assert missing(out)["log_a/loss_curves.png"] == f"{reason}relu"
    assert missing(out)["log_c/position_analysis.png"] == f"{reason}C2"


def test_a_campaign_that_has_not_ended_is_told_so(tmp_path: Path):
    with pytest.raises(UserError, match="has no campaign.json; the campaign is not finished"):
        draw(tmp_path)


def test_plot_prints_what_was_drawn_and_why_the_rest_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = made_up.campaign(tmp_path, {"A1": "hard masks"}, evals=("core",))
    monkeypatch.setattr("temposae.campaign.report.write", lambda out: out / "report.md")
    result = commandline.run("plot", out)
    assert str(out / "figures" / "log_a" / "final_metrics.png") in result.out
    assert "log_a/unlearning_scores.png: not drawn: unlearning was not measured" in result.err
