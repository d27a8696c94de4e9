"""Files of results, the tables made from them, and the README, which may hold no figure that no file holds."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from temposae.bench import results
from temposae.bench.results import kept, read, table
from temposae.engine.errors import UserError
from temposae.engine.storage.files import write_json

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- temposae bench table (\S+) -->\n(.*?)\n*<!-- end of table -->", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def case(provider: str, ms: float, **changes: Any) -> dict[str, Any]:
    return dict(
        provider=provider, settings="headline", op="train_step", dtype="bf16", optimizer="Adam", clip=None, auxk=0, N=8, D=4,
        F=16, K=2, ms=ms, ms_p20=0.9 * ms, ms_p80=1.1 * ms, floor_ms=2.0, peak_bytes=2**29, loss_falls=True,
    ) | changes  # fmt: skip


def result(*cases: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return (
        dict(device="Some GPU", versions={"torch": "9.9", "triton": None}, commit="a" * 40, cases=list(cases)) | changes
    )


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def test_step_table() -> None:
    found = table(result(
        case("torch", 10.0, loss_falls=False, clip=1.0),
        case("temposae", 2.5),
        case("torch", 5.0, settings="own", dtype="fp32"),
        case("temposae", 1234.5, F=32),
        left_out={"SAELens": "sae_lens is not installed"},
    ))  # fmt: skip
    first, *_ = found.splitlines()
    assert first == "Some GPU; torch 9.9; commit aaaaaaaaaaaa"
    rows = cells(found)
    assert rows[2] == ["temposae", "Adam", "bf16", "-", "2.5 (2.25 to 2.75)", "1.00", "0.5", "80%", "yes"]
    assert rows[3] == ["torch", "Adam", "bf16", "1", "10 (9 to 11)", "4.00", "0.5", "20%", "NO"]
    assert rows[4][0] == "torch, own defaults"
    assert rows[7][4] == "1234 (1111 to 1358)"  # of the other shape, in a table of its own
    assert "A training step, N = 8, D = 4, F = 32, K = 2:" in found
    assert "Left out: SAELens (sae_lens is not installed)" in found
    assert all(
        len({len(line) for line in block.splitlines()}) == 1 for block in re.findall(r"(?:^\|.*\n)+", found, re.M)
    )


def test_step_table_of_other_activations() -> None:
    """What was written before there were others is of TopK; columns are there for what a race's steps have."""
    work = dict(flops=2e9, bytes=3e9)
    found = table(result(
        case("torch", 10.0),
        case("temposae", 5.0, activation="relu", l0=812.4, **work),
        case("eai-sparsify", 4.0, activation="topk", auxk=64, **work),
        case("temposae", 2.0, activation="topk", auxk=32, **work),
    ))  # fmt: skip
    titles = [line for line in found.splitlines() if line.startswith("A training step")]
    sizes = "N = 8, D = 4, F = 16, K = 2:"
    assert titles == [f"A training step, {name}, {sizes}" for name in ("topk", "relu", "topk with AuxK")]
    rows = cells(found)
    assert rows[0] == [
        "provider", "optimizer", "dtype", "clip", "ms (p20 to p80)", "x temposae", "peak GiB", "of floor", "learns",
    ]  # fmt: skip
    assert rows[3][6:] == ["peak GiB", "L0", "GB", "GFLOP", "floor ms", "of floor", "learns"]
    assert rows[5][6:] == ["0.5", "812", "3", "2", "2", "40%", "yes"]
    assert rows[6][6:9] == ["peak GiB", "AuxK", "GB"]
    assert [(row[0], row[5], row[7]) for row in rows[8:]] == [
        ("temposae", "1.00", "32"),
        ("eai-sparsify", "2.00", "64"),
    ]


def test_op_table() -> None:
    found = table(
        result(case("temposae", 4.0, op="encode", direction="forward", backend="triton", flops=3e12, bytes=2e9))
    )
    assert cells(found)[2] == [
        "encode",
        "forward",
        "N8-D4-F16-K2",
        "bf16",
        "triton",
        "4 (3.6 to 4.4)",
        "2",
        "3e+03",
        "2",
        "50%",
        "0.5",
    ]


def test_commit_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "__file__", str(tmp_path / "bench" / "results.py"))
    monkeypatch.delenv("TEMPOSAE_COMMIT", raising=False)
    assert results.commit() is None  # no clone
    monkeypatch.setenv("TEMPOSAE_COMMIT", "abc")
    assert results.commit() == "abc"

    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    assert results.commit() == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert results.commit() == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("can't be read", "No such file")),
        ("{", ("is not JSON",)),
        ("[]", ("must hold device, versions, commit and cases",)),
        ('{"cases": 3}', ("must hold",)),
        ('{"cases": [{"provider": "torch", "op": "train_step"}]}', ("lacks dtype, N, D, F, K, ms, floor_ms, peak_bytes",)),
        ('{"cases": [3]}', ("a case", "lacks provider")),
    ],
)  # fmt: skip
def test_what_is_no_file_of_results(text: str | None, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read(path)
    assert all(word in str(error.value) for word in ("results:", str(path), *words)[1:]), error.value


# --- what is kept


def test_kept_results_say_what_they_were_measured_on() -> None:
    for path in kept():
        found = read(path)
        assert found["device"], path
        assert found["versions"].get("torch"), path
        assert re.fullmatch(r"[0-9a-f]{40}", found["commit"] or ""), (
            f"{path}: measure at a commit, not at changed files"
        )
        assert found["cases"], path
        assert all(case["ms"] > 0 and case["floor_ms"] > 0 for case in found["cases"]), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_in_documents_are_what_the_command_prints(path: Path) -> None:
    for name, text in BLOCK.findall(path.read_text()):
        assert text.strip() == table(read(ROOT / name)).strip(), f"run: temposae bench table {name}"


def test_the_readme_shows_what_is_kept() -> None:
    shown = {name for path in DOCUMENTS for name, _ in BLOCK.findall(path.read_text())}
    assert {f"bench/results/{path.name}" for path in kept()} >= shown
    assert not kept() or shown, "bench/results holds results that no document shows"


def test_blocks_are_found() -> None:
    text = "<!-- temposae bench table bench/results/a.json -->\n| a |\n\n<!-- end of table -->"
    assert BLOCK.findall(text) == [("bench/results/a.json", "| a |")]


def test_json_of_a_run_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, result(case("torch", 1.0)))
    assert read(path) == json.loads(path.read_text()) == result(case("torch", 1.0))
