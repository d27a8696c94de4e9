"""Who imports whom, read from the source: arrows point one way, and nothing of ours is imported by an absolute name."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("bench", "campaign", "cli", "engine", "evals", "kernels", "variants")
FILES = sorted([*ROOT.glob("*.py"), *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))])
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))

#: what each part may import of ours, itself apart; `cli` may import everything, and only `__main__` imports `cli`
ALLOWED = {
    "kernels": set(),
    "engine": {"kernels"},
    "variants": {"engine", "kernels"},
    "evals": {"engine", "kernels"},
    "campaign": {"engine", "kernels", "variants", "evals"},
    "bench": {"engine", "kernels", "variants", "evals", "campaign"},
    "__init__": {"engine", "kernels", "variants", "evals"},
    "cli": {"bench", "campaign", "engine", "evals", "kernels", "variants"},
    "__main__": {"cli"},
}


class Import(NamedTuple):
    """One imported name: `temposae.kernels.code.SparseCode` for `from ..kernels.code import SparseCode`."""

    name: str
    relative: bool
    at_import: bool  # it runs when the module is imported: not inside a function, nor under `if TYPE_CHECKING`
    line: int


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module that lies in `package`."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, False, at_import, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{start}.{alias.name}", node.level > 0, at_import, node.lineno)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or checking
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not deferred)

    return visit(ast.parse(source), True)


def found_in(path: Path) -> list[Import]:
    package = ".".join(["temposae", *path.relative_to(ROOT).parts[:-1]])
    return list(imports(path.read_text(), package))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_file = pytest.mark.parametrize("path", FILES, ids=named)


def test_reader_resolves_imports() -> None:
    source = (
        "import kernels.code\nfrom . import a\nfrom ..kernels.code import b\ndef f():\n    from ... import triton\n"
    )
    assert list(imports(source, "temposae.engine.stream")) == [
        ("kernels.code", False, True, 1),
        ("temposae.engine.stream.a", True, True, 2),
        ("temposae.engine.kernels.code.b", True, True, 3),
        ("temposae.triton", True, False, 5),
    ]
    assert len(FILES) > 30
    assert {"encode", "select", "decode", "loss", "weight_grad", "adam"} <= set(OPS)


@every_file
def test_arrows_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for found in found_in(path):
        top, _, rest = found.name.partition(".")
        if found.relative and top == "temposae":
            other = rest.split(".")[0]
            assert other == part or other in ALLOWED[part], f"{named(path)}:{found.line}: {part} imports {found.name}"


@every_file
def test_own_modules_are_imported_relatively(path: Path) -> None:
    ours = {"temposae", "cli", "tests", *PARTS}
    for found in found_in(path):
        absolute = not found.relative and found.name.split(".")[0] in ours
        assert not absolute, f"{named(path)}:{found.line}: {found.name} must be a relative import"


@every_file
def test_only_triton_py_needs_triton(path: Path) -> None:
    if path.name == "triton.py":
        return
    for found in found_in(path):
        needs = "triton" in (found.name.split(".") if found.relative else found.name.split(".")[:1])
        assert not (needs and found.at_import), (
            f"{named(path)}:{found.line}: {found.name} must be imported where it is used"
        )


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_three_files(op: str) -> None:
    files = {path.name for path in (ROOT / "kernels" / op).glob("*.py")}
    assert files == {"__init__.py", "reference.py", "triton.py"}


def test_folders_of_kernels_are_ops() -> None:
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/*.py")}
    assert folders == set(OPS)
