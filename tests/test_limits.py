"""Limits on the size of files, functions, the README, the top of `engine` and committed campaigns."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from .test_architecture import FILES, ROOT, named

FILE_LINES, FUNCTION_LINES, PARAMETERS, ENGINE_FILES = 450, 60, 10, 20
CAMPAIGN_BYTES = 1_500_000  # of committed campaigns: reports, figures and numbers
README_WORDS = 1100  # as `wc -w` counts, code and tables included
PUBLIC = {"evals/api.py:evaluate"}  # a public function, with a keyword for each option of `temposae eval`


class Function(NamedTuple):
    """A function as the source has it; `self` and `cls` are no parameters, and decorators no lines."""

    name: str
    lines: int
    parameters: int


def commands(trees: dict[str, ast.Module]) -> set[str]:
    """Names of the functions in `cli` that Typer runs: `app.command(...)(train)` or `@app.command(...)`."""
    names = set[str]()
    for path, tree in trees.items():
        for node in ast.walk(tree) if path.startswith("cli/") else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Call) and _is_command(node.func):
                names |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
            elif isinstance(node, ast.FunctionDef) and any(map(_is_command, node.decorator_list)):
                names.add(node.name)
    return names


def _is_command(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".command", ".callback"))


def functions(tree: ast.Module, prefix: str) -> Iterator[Function]:
    """Every function in a file, methods and inner functions included, but Triton kernels."""

    def visit(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if any(ast.unparse(decorator).startswith("triton.jit") for decorator in child.decorator_list):
                    continue
                arguments = child.args
                parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                parameters += [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
                count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
                yield Function(f"{prefix}{child.name}", (child.end_lineno or 0) - child.lineno + 1, count)
            inner = f"{prefix}{child.name}." if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else prefix
            yield from visit(child, inner)

    return visit(tree, prefix)


TREES = {named(path): ast.parse(path.read_text()) for path in FILES}
COMMANDS = commands(TREES)
FUNCTIONS = [
    function
    for path, tree in TREES.items()
    for function in functions(tree, f"{path}:")
    if not (path.startswith("cli/") and function.name.partition(":")[2] in COMMANDS)
]


def test_reader_sees_commands_and_functions() -> None:
    assert {"train", "cache", "config", "doctor", "campaign", "step"} <= COMMANDS
    source = (
        "class A:\n    def f(self, a, *b, c=1, **d):\n        def g():\n            pass\n\n@triton.jit\ndef h(a): ..."
    )
    assert list(functions(ast.parse(source), "x.py:")) == [("x.py:A.f", 3, 4), ("x.py:A.f.g", 2, 0)]


def test_files_are_short() -> None:
    assert [named(path) for path in FILES if len(path.read_text().splitlines()) > FILE_LINES] == []


def test_functions_are_short() -> None:
    assert [function.name for function in FUNCTIONS if function.lines > FUNCTION_LINES] == []


def test_functions_have_few_parameters() -> None:
    """But for the ops of `kernels`, which take the operands of a launch."""
    many = {function.name for function in FUNCTIONS if function.parameters > PARAMETERS}
    assert {name for name in many if not name.startswith("kernels/")} == PUBLIC


def test_committed_campaigns_are_small() -> None:
    files = [path for path in (ROOT / "docs" / "campaign").rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) <= CAMPAIGN_BYTES


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_the_top_of_engine_has_few_files() -> None:
    assert len(list((ROOT / "engine").glob("*.py"))) <= ENGINE_FILES
