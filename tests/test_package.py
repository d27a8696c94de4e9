"""What is installed: a wheel that holds `temposae` and nothing else, and an import that costs little."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from zipfile import ZipFile

import pytest
import temposae

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "bench/peers"  # other libraries', shipped as files, and nobody's modules
NOT_SHIPPED = ("tests", "docs", "examples", "build", "dist", "runs")
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def source_files(pattern: str) -> list[Path]:
    """Files of the package, relative to its root; not tests, not scripts, not what was built, not virtual environments."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob(pattern) if path.parent != SCRIPTS)
    return sorted(p for p in found if p.parts[0] not in NOT_SHIPPED and not any(x.startswith(".") for x in p.parts))


def python(*args: str, **env: str) -> str:
    """Standard output of a fresh interpreter, which must succeed. It starts far from here, where no `kernels` lies about."""
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=os.environ | env, cwd=ROOT.anchor, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that the repository stays clean."""
    place = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, place / "source", ignore=skip)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(place / "source"))
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def target(wheel: Path) -> Path:
    """A folder into which the wheel alone is installed."""
    folder = wheel.parent / "target"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def test_wheel_holds_every_module_the_embedded_model_the_page_and_measured_results(wheel: Path) -> None:
    shipped = {name for name in ZipFile(wheel).namelist() if name.startswith("temposae/")}
    model = [path.relative_to(ROOT) for path in (ROOT / "engine/testbed/model").iterdir()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model}
    results = [path.relative_to(ROOT) for path in (ROOT / "bench/results").rglob("*.json")]
    scripts = [path.relative_to(ROOT) for path in SCRIPTS.iterdir() if path.is_file()]
    others = [*model, *results, *scripts, "evals/dashboard.html", "py.typed"]
    assert shipped == {f"temposae/{path}" for path in [*source_files("*.py"), *others]}


def test_wheel_makes_nothing_but_temposae_importable(target: Path) -> None:
    assert {path.name for path in target.iterdir() if path.name != "bin"} == {
        "temposae",
        f"temposae-{temposae.__version__}.dist-info",
    }
    assert PathFinder.find_spec("temposae", [str(target)])
    for name in ("kernels", "engine", "evals", "reporting", "bench", "variants", "cli", "tests"):
        assert PathFinder.find_spec(name, [str(target)]) is None, name


IMPORT_ALL = """
import importlib, importlib.util, pathlib, pkgutil, sys
target = pathlib.Path(sys.argv[1])
import temposae

def fail(name):
    raise

assert target in pathlib.Path(temposae.__file__).parents, temposae.__file__
without = () if importlib.util.find_spec("triton") else (".triton", ".merge", ".ragged")
for info in pkgutil.walk_packages(temposae.__path__, "temposae.", onerror=fail):
    if not info.name.endswith(without):
        module = importlib.import_module(info.name)
        assert target in pathlib.Path(module.__file__).parents, module.__file__
        print(info.name)
"""


def python_with(target: Path, code: str, *args: str) -> str:
    """Standard output of an interpreter that finds the wheel alone. -S leaves out site-packages with its .pth files, so no
    editable install is found; the folders are put back as plain entries of the path, behind the target."""
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return python("-S", "-c", code, *args, PYTHONPATH=os.pathsep.join([str(target), *others]))


def test_every_installed_module_imports(target: Path) -> None:
    imported = python_with(target, IMPORT_ALL, str(target)).split()
    expected = {
        ".".join(("temposae", *p.with_suffix("").parts)).removesuffix(".__init__") for p in source_files("*.py")
    }
    missing = expected - {"temposae", *imported}
    assert not missing or (
        sys.platform != "linux" and all(name.endswith((".triton", ".merge", ".ragged")) for name in missing)
    )


def test_an_installed_package_finds_its_own_parts(target: Path) -> None:
    code = (
        "from temposae.engine import registry; print(registry.is_own(registry.find('layer_norm')), registry.__file__)"
    )
    assert python_with(target, code).split() == ["True", str(target / "temposae/engine/registry.py")]


def test_packages_are_all_listed() -> None:
    folders = {path.parent for path in source_files("*.py")}
    inits = {path.parent for path in source_files("__init__.py")}
    assert folders == inits
    assert sorted(PACKAGES) == sorted(".".join(("temposae", *path.parts)) for path in inits)


def test_import_is_quick_and_without_torch() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import temposae; "
        "print(time.perf_counter() - began, *(name for name in ('torch', 'numpy', 'typer') if name in sys.modules))"
    )
    outputs = [python("-c", code).split() for _ in range(3)]
    assert [heavy for _, *heavy in outputs] == [[], [], []]
    assert min(float(seconds) for seconds, *_ in outputs) < 0.3


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["eval", "core"], ["dashboard"], ["testbed", "sample"], ["doctor"], ["config"]],
    ids=" ".join,
)
def test_help_does_not_import_torch(command: list[str]) -> None:
    code = (
        "import sys; from temposae.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert "Usage:" in python("-c", code, *command, "--help")


def test_public_names_are_those_that_are_loaded_lazily() -> None:
    assert set(temposae.__all__) == {*temposae._WHERE, "__version__"}


@pytest.mark.parametrize("name", temposae.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(temposae, name)
    assert name in dir(temposae)
    assert isinstance(value, str) or value.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        temposae.nonsense  # noqa: B018


def test_constraints_pin_what_was_tested() -> None:
    pins = re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert dict(pins).items() >= {"torch": "2.13.0", "triton": "3.7.1", "transformer_lens": "3.9.0"}.items()
