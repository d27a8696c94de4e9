"""`temposae.ops`: values and gradients of their formulas, and what torch.library and torch.compile ask of an op."""

import warnings

import pytest
import torch
from temposae import ops
from torch import Tensor

N, D, F, K, T = 30, 10, 36, 5, 6
NAMES = ("x", "W_enc", "b_enc", "center", "mask", "W_dec", "b_dec")


def drawn(*, mask: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "x": (N, D),
        "W_enc": (D, F),
        "b_enc": (F,),
        "center": (D,),
        "mask": (T, F),
        "W_dec": (F, D),
        "b_dec": (D,),
    }
    found = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    found["mask"] = found["mask"].sigmoid()
    return found if mask else {name: tensor for name, tensor in found.items() if name != "mask"}


POS = torch.arange(N) % T
THRESHOLD = torch.full((F,), 0.7)


def coded(kind: str, t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """values, indices, offsets by the op."""
    where = {"center": t["center"], "mask": t.get("mask"), "pos": POS if "mask" in t else None}
    if kind == "topk":
        return *ops.encode_topk(t["x"], t["W_enc"], t["b_enc"], K, **where), None
    if kind == "batchtopk":
        return ops.encode_batch_topk(t["x"], t["W_enc"], t["b_enc"], K, **where)
    return ops.encode_threshold(t["x"], t["W_enc"], t["b_enc"], THRESHOLD if kind == "threshold" else None, **where)


def reconstructed(kind: str, t: dict[str, Tensor]) -> Tensor:
    values, indices, offsets = coded(kind, t)
    return ops.decode(values, indices, t["W_dec"], t["b_dec"], offsets=offsets)


def by_formula(kind: str, t: dict[str, Tensor]) -> Tensor:
    acts = torch.relu((t["x"] - t["center"]) @ t["W_enc"] + t["b_enc"]) * (t["mask"][POS] if "mask" in t else 1)
    if kind == "topk":
        kept = torch.zeros_like(acts).scatter(1, acts.topk(K).indices, 1)
    elif kind == "batchtopk":
        kept = torch.zeros(N * F).to(acts).scatter(0, acts.flatten().topk(N * K).indices, 1).view(N, F)
    else:
        kept = (acts > (THRESHOLD if kind == "threshold" else 0)).to(acts)
    return (acts * kept) @ t["W_dec"] + t["b_dec"]


KINDS = ("topk", "batchtopk", "threshold", "relu")


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formula(kind, mask, assert_close):
    plain = {name: tensor.requires_grad_() for name, tensor in drawn(mask=mask).items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in plain.items()}
    found, expected = reconstructed(kind, plain), by_formula(kind, wide)
    assert_close(found, expected, name="x_hat")
    toward = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    (found * toward).sum().backward()
    (expected * toward).sum().backward()
    for name, tensor in plain.items():
        assert_close(tensor.grad, wide[name].grad, name=name)
        assert tensor.grad.dtype == tensor.dtype


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_by_itself(wanted, assert_close):
    every, t = drawn(), drawn()
    for tensor in every.values():
        tensor.requires_grad_()
    reconstructed("topk", every).square().sum().backward()
    t[wanted].requires_grad_()
    reconstructed("topk", t).square().sum().backward()
    assert_close(t[wanted].grad, every[wanted].grad, 1e-6)


def test_narrow_activations_with_wide_parameters(assert_close):
    t = drawn()
    wide = {name: tensor.bfloat16().float().requires_grad_() for name, tensor in t.items()}
    narrow = {name: tensor.detach().clone() for name, tensor in wide.items()}
    narrow["x"] = narrow["x"].bfloat16()
    for tensor in narrow.values():
        tensor.requires_grad_()
    values, indices = ops.encode_topk(
        narrow["x"], narrow["W_enc"], narrow["b_enc"], K, center=narrow["center"], mask=narrow["mask"], pos=POS
    )
    assert values.dtype == torch.float32
    ops.decode(values, indices, narrow["W_dec"], narrow["b_dec"]).sum().backward()
    reconstructed("topk", wide).sum().backward()
    assert narrow["x"].grad.dtype == torch.bfloat16
    for name in ("W_dec", "b_dec"):
        assert narrow[name].grad.dtype == torch.float32
        assert_close(narrow[name].grad, wide[name].grad, 5e-2, name=name)


def test_position_loss():
    residual = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    squared_error, count = ops.position_loss(residual, POS, T + 1)
    for p in range(T + 1):
        assert squared_error[p].item() == pytest.approx(residual[p == POS].square().sum().item())
        assert count[p] == (p == POS).sum()
    weights = torch.arange(T + 1.0, dtype=torch.float64)
    (squared_error * weights).sum().backward()
    torch.testing.assert_close(residual.grad, 2 * weights[POS][:, None] * residual)


def test_position_loss_by_kernels(monkeypatch):
    """Their sums are views of one tensor, which torch refuses as the results of an op."""
    pytest.importorskip("triton")
    residual = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    expected = ops.position_loss(residual, POS, T)
    monkeypatch.setenv("TEMPOSAE_BACKEND", "triton")
    torch.testing.assert_close(ops.position_loss(residual, POS, T), expected)


def arguments(name: str) -> tuple:
    t = {key: tensor.requires_grad_() for key, tensor in drawn().items()}
    encoder = (t["x"], t["W_enc"], t["b_enc"])
    where = (t["center"], t["mask"], POS)
    values, indices, _ = coded("topk", drawn())
    return {
        "encode_topk": (*encoder, *where, K), "encode_batch_topk": (*encoder, None, None, None, K),
        "encode_threshold": (*encoder, THRESHOLD, *where, 64),
        "decode": (values.requires_grad_(), indices, t["W_dec"], t["b_dec"], None),
        "position_loss": (torch.randn(N, D, requires_grad=True), POS, T),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ops.__all__)
def test_torch_finds_nothing_wrong_with_the_op(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own checks
        torch.library.opcheck(getattr(torch.ops.temposae, name).default, arguments(name))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_takes_it_whole(kind, assert_close):
    def loss(t: dict[str, Tensor]) -> Tensor:
        squared_error, _ = ops.position_loss(t["x"].detach() - reconstructed(kind, t), POS, T)
        return squared_error.sum()

    plain, compiled = drawn(), drawn()
    for tensor in (*plain.values(), *compiled.values()):
        tensor.requires_grad_()
    torch.compiler.reset()
    expected, found = loss(plain), torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    assert_close(found, expected, 1e-6)
    expected.backward()
    found.backward()
    for name, tensor in plain.items():
        assert_close(compiled[name].grad, tensor.grad, 1e-6, name=name)


def test_fake_tensors_tell_shapes_and_dtypes_without_work():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, W = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(D, F)
        values, indices = ops.encode_topk(x, W, torch.empty(F), K)
        x_hat = ops.decode(values, indices, W.T, torch.empty(D))
    assert (values.shape, values.dtype, indices.dtype) == ((N, K), torch.float32, torch.int32)
    assert (x_hat.shape, x_hat.dtype) == ((N, D), torch.float32)


def test_what_does_not_fit_is_refused():
    t = drawn()
    with pytest.raises(ValueError, match="k must lie in"):
        ops.encode_topk(t["x"], t["W_enc"], t["b_enc"], F + 1)
    with pytest.raises(ValueError, match="mask needs pos"):
        ops.encode_topk(t["x"], t["W_enc"], t["b_enc"], K, mask=t["mask"])
    values, indices = ops.encode_topk(t["x"], t["W_enc"], t["b_enc"], K)
    with pytest.raises(ValueError, match="indices must be int32"):
        ops.decode(values, indices.long(), t["W_dec"], t["b_dec"])
