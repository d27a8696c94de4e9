"""What libraries' training codes reach: the same batches, seeds, the choice of a rate, the table, what is refused."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from temposae.bench import quality
from temposae.bench.data import Shape
from temposae.bench.data import tokens as made_up
from temposae.bench.learning_rate import Cell
from temposae.bench.providers import PROVIDERS
from temposae.bench.training_job import TrainingJob
from temposae.engine.config import TrainConfig

from ..commandline import run

CELL = Cell("topk", 24, 3, 64, 12)
SHAPE = Shape(CELL.batch, 16, CELL.F, CELL.K)
PEERS = {"SAELens": "sae_lens", "dictionary_learning": "dictionary_learning", "eai-sparsify": "sparsify"}
INSTALLED = [name for name in quality.LIBRARIES if name not in PEERS or find_spec(PEERS[name])]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Activations for every source, so that no test makes 100,000 of them."""
    x = made_up(Shape(2000, 16, 1, 1), "cpu", torch.float32, count=1).batches[0].x
    monkeypatch.setattr(quality, "activations", lambda source, data: x)
    monkeypatch.setattr(quality, "HELD_OUT", 500)
    return x


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("library", INSTALLED)
def test_a_dictionary_is_what_its_library_trains(library, activation, assert_close):
    if activation not in PROVIDERS[library].activations:
        return
    given = made_up(SHAPE, "cpu", torch.float32)
    job = TrainingJob(SHAPE, "cpu", "fp32", 1e-3, given, activation=activation)
    first, second, other = (PROVIDERS[library].build(job._replace(seed=seed)) for seed in (0, 0, 1))
    x = given.wide[0]
    for trained in (first, second, other):
        for i in range(3):
            trained.step(i)
    with torch.no_grad():
        f = first.dictionary.encode(x)
        assert f.shape == (SHAPE.N, SHAPE.F)
        assert (f > 0).sum() <= SHAPE.N * SHAPE.K
        assert_close(first.dictionary.decode(f), first.reconstruct(x).float())
        assert first.dictionary.W_dec.shape == (SHAPE.F, SHAPE.D)
        unit = torch.zeros(1, SHAPE.F)
        unit[0, 5] = 1.0
        row = first.dictionary.decode(unit) - first.dictionary.decode(0 * unit)
        assert torch.cosine_similarity(row, first.dictionary.W_dec[5:6]) > 0.999
        assert torch.equal(f, second.dictionary.encode(x))
        assert not torch.allclose(f, other.dictionary.encode(x)), "a seed has its own weights"


def test_each_run_is_a_row_and_is_measured_once(source):
    kept = []
    sources = {"some=x.npy": [CELL]}
    first = quality.measure(sources, libraries=["temposae"], rates=[1e-3], seeds=1)
    result = quality.measure(
        sources, libraries=["temposae"], rates=[1e-3, 4e-3], seeds=2, done=json.loads(json.dumps(first)),
        keep=lambda result: kept.append(len(result["rows"])),
    )  # fmt: skip
    assert kept == [2, 3, 4]
    assert [(row["lr"], row["seed"]) for row in result["rows"]] == [(1e-3, 0), (1e-3, 1), (4e-3, 0), (4e-3, 1)]
    assert result["rows"][0] == first["rows"][0]
    fvus = [row["fvu"] for row in result["rows"]]
    assert len(set(fvus)) == 4
    assert all(0 < fvu < 1 for fvu in fvus)
    again = quality.measure(sources, libraries=["temposae"], rates=[1e-3], seeds=1)["rows"][0]
    assert {key: again[key] for key in ("fvu", "dead")} == {key: first["rows"][0][key] for key in ("fvu", "dead")}
    assert first["rows"][0]["f1"] is None


def test_ours_clips_as_in_temposae_train(source, monkeypatch):
    """SAELens and dictionary_learning always clip. Without it, the error was a tenth higher at small rates."""
    clips, build = [], PROVIDERS["temposae"].build
    monkeypatch.setitem(
        PROVIDERS, "temposae", PROVIDERS["temposae"]._replace(build=lambda job: clips.append(job.clip) or build(job))
    )
    quality.measure({"some=x.npy": [CELL]}, libraries=["temposae"], rates=[1e-3], seeds=1)
    assert clips == [TrainConfig().clip_norm]
    assert clips[0] is not None


def test_a_world_gives_f1_and_mcc():
    cell = Cell("topk", 64, 4, 256, 30)
    (row,) = quality.measure({"world:0": [cell]}, libraries=["temposae"], rates=[2e-3], seeds=1)["rows"]
    assert 0 < row["f1"] < 1
    assert 0.3 < row["mcc"] < 1
    assert 0 < row["fvu"] < 1


def rows(library, lr, fvus):
    setting = {"source": "world:0", **CELL._asdict(), "library": library, "lr": lr}
    scores = {"dead": 0.25, "f1": 0.5, "mcc": None, "seconds": 2.0}
    return [setting | scores | {"seed": seed, "fvu": fvu} for seed, fvu in enumerate(fvus)]


def test_the_table_has_the_best_rate_of_each_library():
    result = {
        "device": "a device", "versions": {"torch": "1"}, "commit": None, "left_out": {"eai-sparsify": "it is not there"},
        "rows": [
            *rows("temposae", 1e-3, [0.2, 0.3]), *rows("temposae", 2e-3, [0.1, 0.2]), *rows("SAELens", 1e-3, [0.15, 0.31]),
            *rows("SAELens", 2e-3, [float("nan"), 0.01]),
        ],
    }  # fmt: skip
    text = quality.table(result)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    table = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [(line["library"], line["lr"], line["FVU"]) for line in table] == [
        ("temposae", "0.002", "0.1500"), ("SAELens", "0.001", "0.2300"),
    ]  # fmt: skip
    assert [line["minus temposae"] for line in table] == ["", "+0.0800 ± 0.0300"]
    assert (table[0]["dead"], table[0]["F1"], table[0]["MCC"]) == ("25.0%", "0.500", "-")
    assert "eai-sparsify was left out: it is not there" in text


def test_the_document_shows_what_was_measured():
    files = sorted(Path(quality.__file__).parent.glob("results/quality/*.json"))
    assert files
    document = (Path(quality.__file__).parents[1] / "docs" / "bench.md").read_text()
    blocks = dict(
        re.findall(
            r"<!-- temposae bench quality bench/results/quality/(\S+) -->\n(.*?)<!-- end of table", document, re.S
        )
    )
    assert blocks.keys() == {file.name for file in files}
    for file in files:
        assert blocks[file.name].strip() in quality.table(json.loads(file.read_text())), file.name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--library", "SAElens"], "library: 'SAElens' is not allowed; there are temposae, SAELens,"),
        (["--cell", "relu,24,3,64,12"], "cell: relu is not allowed; it must be topk or batchtopk, which fix L0"),
        (["--cell", "topk,24,30,64,12"], "sae.k: 30 is not allowed; it must be at most d_sae (24)"),
        (["--source", "world"], "source: 'world' is not allowed; it must be synthetic:WIDTH, world:SEED, MODEL:LAYER"),
        (["--lr", "0"], "--lr"),
        (["--preset", "cpus"], "preset: 'cpus' is not allowed; there are tiny, cpu, pretrained"),
    ],
)
def test_mistakes_are_one_line(arguments, says, tmp_path: Path):
    status, _, err = run("bench", "quality", *arguments, "--json", str(tmp_path / "rows.json"))
    assert status == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_file_of_another_suite_is_refused(tmp_path: Path):
    (tmp_path / "rows.json").write_text('{"cases": []}')
    status, _, err = run("bench", "quality", "--json", str(tmp_path / "rows.json"))
    assert status == 2
    assert "must hold results of `temposae bench quality`" in err
