"""Who imports whom, read from the source: arrows point one way, no modules import each other, and nothing of ours is
imported by an absolute name or by a name in a string."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("bench", "campaign", "cli", "engine", "evals", "kernels", "reporting", "variants")
FILES = sorted([*ROOT.glob("*.py"), *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))])
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
KERNEL_FILES = {
    "triton.py",
    "candidates.py",
    "persistent.py",
    "merge.py",
    "ragged.py",
}  # all but the first in encode_sparse

#: what each part may import of ours, itself apart; `cli` may import everything, and only `__main__` imports `cli`
ALLOWED = {
    "kernels": set(),
    "engine": {"kernels"},
    "variants": {"engine", "kernels"},
    "reporting": {"engine", "kernels"},
    "evals": {"engine", "kernels", "reporting"},
    "campaign": {"engine", "kernels", "variants", "reporting", "evals"},
    "bench": {"engine", "kernels", "variants", "reporting", "evals", "campaign"},
    "__init__": {"engine", "kernels", "variants", "evals"},
    "cli": {"bench", "campaign", "engine", "evals", "kernels", "reporting", "variants"},
    "__main__": {"cli"},
}

#: files that import modules by names in strings: public names, libraries' mixins, evals and kernels, each when it is needed.
#: Those of `cli` may, too.
STRING_IMPORTS = {
    "__init__.py", "bench/aot.py", "bench/op_benches.py", "engine/accelerate/__init__.py", "evals/suite.py"
}  # fmt: skip


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


def module_of(path: Path) -> str:
    return ".".join(["temposae", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports anywhere: at its top, in functions, and for type checkers."""
    modules = {module_of(path): path for path in FILES}

    def resolved(name: str) -> str:
        return name if name in modules else name.rpartition(".")[0]

    return {
        module: {resolved(entry.name) for entry in found_in(path) if entry.relative} & modules.keys() - {module}
        for module, path in modules.items()
    }


def reached_from(start: str, graph: dict[str, set[str]]) -> set[str]:
    """All that a module imports, directly or by way of others."""
    reached, pending = set[str](), [start]
    while pending:
        new = graph[pending.pop()] - reached
        reached |= new
        pending += new
    return reached


def string_import(source: str) -> int | None:
    """The first line that imports a module of ours by a name in a string: a literal, a constant, or one of a table."""
    tree = ast.parse(source)
    constants: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                constants |= {name.id: value for name, value in pairs if isinstance(name, ast.Name)}

    def texts(node: ast.expr | None) -> Iterator[str]:
        """What the name may begin with."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield from texts(node.values[0])
        elif isinstance(node, ast.BinOp):
            yield from texts(node.left)
        elif isinstance(node, ast.Name):
            yield from texts(constants.pop(node.id, None))
        elif isinstance(node, ast.Subscript):
            yield from texts(node.value)
        elif isinstance(node, ast.Dict):
            for value in node.values:
                yield from texts(value)

    lines = (
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))
        for text in texts(node.args[0])
        if text.startswith(".") or text.split(".")[0] == "temposae"
    )
    return next(lines, None)


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


def test_no_modules_import_each_other() -> None:
    graph = import_graph()
    assert graph["temposae.engine.config.run"] >= {"temposae.engine.registry", "temposae.engine.config.sae"}
    in_a_cycle = {module for module in graph if module in reached_from(module, graph)}
    assert in_a_cycle == set(), {module: graph[module] & in_a_cycle for module in in_a_cycle}


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('import_module("temposae.variants")', 1),
        ('importlib.import_module(".triton", __package__)', 1),
        ('A, B = "temposae.variants", "x"\ndef f():\n    import_module(A)', 3),
        ('import_module(f"..kernels.{op}.triton", __package__)', 1),
        ('_WHERE = {"a": ".engine"}\nimport_module(_WHERE[name], __name__)', 2),
        ('__import__("temposae" + name)', 1),
        (
            'import_module("temposae_plugin")\nimport_module("torch")\nimport_module(plugin)\nGROUP = "temposae.parts"',
            None,
        ),
    ],
)
def test_reader_sees_names_in_strings(source: str, line: int | None) -> None:
    assert string_import(source) == line


def test_own_modules_are_not_imported_by_names_in_strings() -> None:
    importers = {named(path) for path in FILES if string_import(path.read_text()) is not None}
    assert {path for path in importers if not path.startswith("cli/")} == STRING_IMPORTS


@every_file
def test_only_kernels_need_triton(path: Path) -> None:
    if path.name in KERNEL_FILES:
        return
    for found in found_in(path):
        needs = "triton" in (found.name.split(".") if found.relative else found.name.split(".")[:1])
        assert not (needs and found.at_import), (
            f"{named(path)}:{found.line}: {found.name} must be imported where it is used"
        )


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_four_files(op: str) -> None:
    files = {path.name for path in (ROOT / "kernels" / op).glob("*.py")}
    assert files - (KERNEL_FILES - {"triton.py"}) == {"__init__.py", "reference.py", "triton.py", "bench.py"}


@pytest.mark.parametrize("op", OPS)
def test_twins_are_independent(op: str) -> None:
    """The kernels of an op take nothing from any op's reference, wherever they import it, nor a reference from kernels."""
    for file, twin in (("triton.py", "reference"), ("reference.py", "triton")):
        path = ROOT / "kernels" / op / file
        for imported in found_in(path):
            assert not (imported.relative and twin in imported.name.split(".")), (
                f"{named(path)}:{imported.line}: {imported.name}"
            )


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "kernels")], ids=named)
def test_only_bench_needs_what_it_times(path: Path) -> None:
    """Ops work without their `bench.py` and the records in it."""
    if path.name not in ("bench.py", "bench_types.py"):
        for imported in found_in(path):
            assert not {"bench", "bench_types"} & set(imported.name.split(".")), (
                f"{named(path)}:{imported.line}: {imported.name}"
            )


def test_kernels_import_each_other_in_no_circle() -> None:
    """Imports inside functions and under `if TYPE_CHECKING` count."""
    modules = {
        ".".join(["temposae", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in FILES
        if path.is_relative_to(ROOT / "kernels")
    }
    arrows = {
        module: {owner(imported.name, modules) for imported in found_in(path)} for module, path in modules.items()
    }
    # a package's own file imports its modules, inside functions too: they must not import it
    ready: set[str | None] = {None}
    while waiting := {module for module in arrows if module not in ready}:
        now = {module for module in waiting if arrows[module] - {module} <= ready}
        assert now, f"a circle among {sorted(waiting)}"
        ready |= now


def owner(name: str, modules: dict[str, Path]) -> str | None:
    """The module that an imported name is or lies in, if it is one of these."""
    parts = name.split(".")
    return next((start for n in range(len(parts), 0, -1) if (start := ".".join(parts[:n])) in modules), None)


def test_folders_of_kernels_are_ops() -> None:
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/*.py")}
    assert folders == set(OPS)
