"""Every kernel is launched on the device of its tensors, whichever is current."""

import ast
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from temposae.kernels.backend import launch_kernel

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
BUILT_IN = {"dict", "list", "set", "tuple"}


def direct_launches(source: str) -> list[int]:
    """Lines that call `kernel[grid](...)`, `kernel.run(...)` or `kernel.warmup(...)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    lines = []
    for call in calls:
        function = call.func
        if isinstance(function, ast.Subscript):
            is_launch = ast.unparse(function.value) not in BUILT_IN
        else:
            is_launch = re.search(r"_kernel\.(run|warmup)$", ast.unparse(function)) is not None
        lines += [call.lineno] * is_launch
    return sorted(lines)


def test_reader_sees_direct_launches() -> None:
    source = "a_kernel[(n,)](x)\nkernels[0][grid](x, BLOCK=1)\nb_kernel.run(x)\n"
    assert direct_launches(source) == [1, 2, 3]
    assert direct_launches("dict[str, int]()\nlaunch_kernel(a_kernel, (n,), x)\n") == []


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_no_launcher_bypasses_the_guard(path: Path) -> None:
    source = path.read_text()
    if path == KERNELS / "backend.py":
        assert len(direct_launches(source)) == 1  # launch_kernel's
        return
    assert direct_launches(source) == []
    if path.name in ("triton.py", "candidates.py") and path != KERNELS / "encode_sparse/triton.py":
        assert "launch_kernel(" in source


def test_a_launch_is_made_on_the_device_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, launches = [], []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append((grid, arguments, options, list(entered)))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(3)
    launch_kernel(Kernel(), (7, 2), x, 5, BLOCK=16)
    assert launches == [((7, 2), (x, 5), {"BLOCK": 16}, [x])]
    assert entered == []
