"""How tests compare numbers."""

from torch import Tensor


def assert_close(out: Tensor, reference: Tensor, limit: float = 1e-5, name: str = "output") -> None:
    """||out - reference|| / ||reference|| <= limit, which NaN never meets."""
    assert out.shape == reference.shape, f"{name}: shape {list(out.shape)}, expected {list(reference.shape)}"
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    error, size = (out - reference).norm().item(), reference.norm().item()
    assert error <= limit * size, f"{name}: error {error:.3e} of {size:.3e} exceeds the ratio {limit:.0e}"
