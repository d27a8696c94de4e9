"""`temposae bench` and `temposae profile`: what they print and write; a mistake gets one line before any long work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from temposae.bench.results import read
from temposae.kernels import configs

from ..commandline import run

TINY = ("--n", "32", "--d", "16", "--f", "48", "--k", "4", "--device", "cpu")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_up_rates: Any) -> None:
    monkeypatch.chdir(tmp_path)


REFUSED = {
    "unknown provider": ("bench step --provider temposea", ("provider: 'temposea'", "temposae, eai-sparsify")),
    "unknown preset": ("bench step --preset gpuu", ("preset: 'gpuu'", "tiny, cpu, gpu, sweep")),
    "k above f": ("bench step --k 5 --f 4", ("--k: 5", "at most F (4)")),
    "sizes that are no numbers": ("bench ops --n many", ("--n: 'many'", "numbers")),
    "size zero": ("bench step --n 0", ("--n: 0", "at least 1")),
    "no rounds": ("bench step --rounds 0", ("rounds: 0", "at least 1")),
    "no repeats": ("bench ops --repeats 0", ("repeats: 0", "at least 1")),
    "unknown op": ("bench ops --op encoed", ("op: 'encoed'", "did you mean encode")),
    "unknown dtype": ("bench ops --dtype fp8", ("dtype: 'fp8'", "fp32, bf16, fp16")),
    "step in fp16": ("bench step --dtype fp16", ("dtype: 'fp16'", "fp32, bf16")),
    "unknown device": ("bench step --device tpu", ("device: 'tpu'", "cpu, cuda")),
    "step's json nowhere": ("bench step --json nowhere/f.json", ("json: nowhere/f.json", "folder that exists")),
    "unknown activation": ("bench step --activation topkk", ("activation: 'topkk'", "topk, batchtopk, jumprelu, relu")),
    "AuxK where there is none": (
        "bench step --auxk --activation relu",
        ("auxk", "activation relu", "topk and batchtopk"),
    ),
    "ops' json nowhere": ("bench ops --json nowhere/f.json", ("json: nowhere/f.json", "folder that exists")),
    "profile's json nowhere": ("profile --json nowhere/f.json", ("json: nowhere/f.json", "folder that exists")),
    "profile's trace nowhere": ("profile --trace nowhere/t.json", ("trace: nowhere/t.json", "folder that exists")),
    "profile without steps": ("profile --steps 0", ("steps: 0", "at least 1")),
    "table of nothing": ("bench table nowhere.json", ("results: nowhere.json", "No such file")),
    "report on nothing": ("bench report --results nowhere.json", ("results: nowhere.json", "No such file")),
    "tune's json nowhere": ("bench tune --json nowhere/f.json", ("json: nowhere/f.json", "folder that exists")),
    "tune an unknown entry": ("bench tune --entry mege", ("entry: 'mege'", "did you mean merge")),
    "report's json nowhere": ("bench report --json nowhere/f.json", ("json: nowhere/f.json", "folder that exists")),
    "report into a file": ("bench report --kernel position_sum --out file.txt", ("out: file.txt", "folder")),
    "unknown arch": ("bench report --arch 70", ("arch: 70", "80, 90, 100")),
    "unknown kernel": ("bench report --kernel encoed", ("kernel: 'encoed'", "did you mean")),
    "report under the interpreter": ("bench report --kernel position_sum", ("TRITON_INTERPRET", "unset it")),
}


@pytest.mark.parametrize(("argv", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(argv: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("years of work")
    code, out, err = run(*argv.split())
    assert code != 0, out
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
    assert (tmp_path / "file.txt").read_text() == "years of work"


def test_gpu_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run("bench", "step", "--device", "cuda")
    assert code != 0
    assert err == "error: device: 'cuda' is not allowed; torch finds no GPU here\n"


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path(configs.__file__).read_text()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = run("bench", "tune")
    assert (code, out) == (2, "")
    assert (
        err == "error: device: 'cpu' is not allowed; `bench tune` times kernels on a GPU, and torch finds none here\n"
    )
    assert Path(configs.__file__).read_text() == before


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOSAE_BACKEND", "tritn")
    for command in (("bench", "step"), ("bench", "ops"), ("profile",)):
        code, _, err = run(*command)
        assert code != 0
        assert err.startswith("error: TEMPOSAE_BACKEND is 'tritn'")


def test_step_then_table(tmp_path: Path) -> None:
    argv = (
        "bench",
        "step",
        *TINY,
        "--provider",
        "temposae",
        "--provider",
        "torch",
        "--rounds",
        "2",
        "--json",
        "r.json",
    )
    code, out, err = run(*argv)
    assert code == 0, err
    found = read(tmp_path / "r.json")
    assert {case["provider"] for case in found["cases"]} == {"temposae", "torch"}
    assert found.keys() >= {"device", "versions", "commit", "rates", "when", "threads", "left_out"}
    assert [found["cases"][0][name] for name in "NDFK"] == [32, 16, 48, 4]
    assert "| temposae" in out
    assert "| torch" in out
    assert run("bench", "table", "r.json").out == out


def test_missing_peers_are_named_and_harm_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = __import__("importlib.util").util.find_spec
    peers = ("sparsify", "sae_lens", "dictionary_learning")
    monkeypatch.setattr(
        "temposae.bench.libraries.find_spec", lambda name: None if name.split(".")[0] in peers else found(name)
    )
    given = [
        word for name in ("eai-sparsify", "SAELens", "dictionary_learning", "temposae") for word in ("--provider", name)
    ]
    code, out, err = run("bench", "step", *TINY, *given, "--rounds", "1", "--json", "r.json")
    assert code == 0, err
    left_out = [line for line in out.splitlines() if line.startswith("Left out: ")]
    assert left_out == [
        "Left out: eai-sparsify (sparsify is not installed)",
        "Left out: SAELens (sae_lens is not installed)",
        "Left out: dictionary_learning (dictionary_learning is not installed)",
    ]
    assert [case["provider"] for case in read(tmp_path / "r.json")["cases"]] == ["temposae"]


def test_each_op_is_written_as_it_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from temposae.bench import ops

    case = ops._case

    def interrupted(name: str, *arguments: Any) -> dict[str, Any]:
        if name == "decode":
            assert [kept["op"] for kept in read(tmp_path / "r.json")["cases"]] == ["encode", "encode_topk"]
            raise RuntimeError
        return case(name, *arguments)

    monkeypatch.setattr(ops, "_case", interrupted)
    chosen = [word for name in ("encode", "encode_topk", "decode") for word in ("--op", name)]
    with pytest.raises(RuntimeError):
        run("bench", "ops", *TINY, *chosen, "--repeats", "2", "--json", "r.json")
    assert len(read(tmp_path / "r.json")["cases"]) == 2


def test_ops(tmp_path: Path) -> None:
    code, out, err = run(
        "bench", "ops", *TINY, "--op", "encode", "--op", "decode", "--repeats", "2", "--json", "r.json"
    )
    assert code == 0, err
    assert [case["op"] for case in read(tmp_path / "r.json")["cases"]] == ["encode", "decode"]
    assert "| encode" in out


def test_profile(tmp_path: Path) -> None:
    code, out, err = run("profile", *TINY, "--steps", "1", "--json", "p.json")
    assert code == 0, err
    found = json.loads((tmp_path / "p.json").read_text())
    assert found.keys() >= {"stages", "step_ms", "idle_ms", "gaps", "device", "commit", "shape"}
    assert all(f"| {row['stage']}" in out for row in found["stages"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_report_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own, because this one interprets kernels instead of compiling them."""
    pytest.importorskip("triton")
    results = {"provider": "temposae", "op": "train_step", "dtype": "bf16", "N": 8192, "D": 2304, "F": 65536, "K": 64}
    results |= {"ms": 10.0, "floor_ms": 8.6, "peak_bytes": 2**33, "loss_falls": True}
    rates = {"device": "H100", "flops": {"2": 6.6e14}, "bytes_per_s": 3e12, "l2_bytes_per_s": 5.5e12, "source": "table"}
    whole = {"device": "Some GPU", "versions": {}, "commit": None, "rates": rates, "cases": [results]}
    (tmp_path / "r.json").write_text(json.dumps(whole))
    argv = ["bench", "report", "--out", "made/here", "--arch", "80", "--kernel", "position_sum", "--results", "r.json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "temposae", *argv, "--json", "f.json"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "made/here/report.json").read_text())
    assert found == json.loads((tmp_path / "f.json").read_text())
    (row,) = found["kernels"]
    assert row.keys() == {
        "name", "arch", "hot", "registers", "spill_bytes", "shared_bytes", "tensor_core_instructions", "instructions",
        "loop_instructions", "loops", "ctas_per_sm", "triton",
    }  # fmt: skip
    assert found["prediction"] == {}  # only one kernel is compiled
    assert row.items() >= {"name": "position_sum", "arch": 80, "hot": True}.items()
    assert row["registers"] > 0
    text = (tmp_path / "made/here/report.md").read_text()
    assert "| position_sum" in text
    assert "86%" in text  # 8.6 of 10 ms
    for name in ("roofline", "steps", "scaling"):
        assert (tmp_path / f"made/here/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert text in done.stdout


def test_report_measures_first_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from temposae.bench import ops, report, step
    from temposae.bench.data import HEADLINE

    asked: list[Any] = []

    def measured(name: str) -> Any:
        def measure(shapes: Any, *args: Any, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
            asked.append((name, shapes, settings["device"], settings["dtype"]))
            return [{"op": name}], {f"{name}'s": "reason"}

        return measure

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert report._measure_here() == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(step, "measure", measured("train_step"))
    monkeypatch.setattr(ops, "measure", measured("encode"))
    monkeypatch.setattr(report, "record", lambda cases, left_out, device: dict(cases=cases, left_out=left_out))
    cases = [{"op": "train_step"}, {"op": "encode"}]
    left_out = {"train_step's": "reason", "encode's": "reason"}
    assert report._measure_here() == [dict(cases=cases, left_out=left_out)]
    assert asked == [(name, [HEADLINE], "cuda", "bf16") for name in ("train_step", "encode")]


@pytest.mark.parametrize(
    "command", ["bench", "bench step", "bench ops", "bench tune", "bench report", "bench table", "profile"]
)
def test_help_comes_without_torch(command: str) -> None:
    code = (
        "import sys; from temposae.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
