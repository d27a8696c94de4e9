"""The differentiable steps: values and every gradient against autograd through dense float64 formulas."""

import gc
import weakref

import pytest
import torch
from temposae.kernels.autograd import (
    decode_sparse,
    encode_dense,
    encode_jumprelu,
    encode_topk,
    position_loss,
    reconstruct,
)

MASKS = pytest.mark.parametrize("mask_kind", ["no mask", "hard mask", "learnable mask"])
LEAVES = ("x", "W_enc", "b_enc", "center", "mask", "W_dec", "b_dec")


def draw(shape, mask_kind="no mask"):
    """Everything a step needs; floating tensors are leaves that require grad, W_enc latent-major."""
    n, d, f, _, t = shape
    generator = shape.generator

    def normal(*size):
        return torch.randn(*size, generator=generator)

    mask = None
    if mask_kind == "hard mask":
        mask = torch.rand(t, f, generator=generator) < 0.7
    elif mask_kind == "learnable mask":
        mask = torch.rand(t, f, generator=generator) + 0.1
    inputs = dict(
        x=2 * normal(n, d), W_enc=normal(f, d).T / d**0.5, b_enc=normal(f), center=normal(d), mask=mask,
        W_dec=normal(f, d), b_dec=normal(d), pos=torch.randint(0, t, (n,), generator=generator), target=normal(n, d),
        aux_latents=torch.rand(f, generator=generator) < 0.4, weights=torch.rand(2, t, generator=generator),
    )  # fmt: skip
    for name in LEAVES:
        if inputs[name] is not None and inputs[name].dtype.is_floating_point:
            inputs[name].requires_grad_()
    return inputs


def in_float64(inputs):
    return {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        if tensor is not None and tensor.dtype.is_floating_point
        else tensor
        for name, tensor in inputs.items()
    }


def dense_acts(i):
    acts = torch.relu((i["x"] - i["center"]) @ i["W_enc"] + i["b_enc"])
    return acts if i["mask"] is None else acts * i["mask"][i["pos"]]


def weighted(i, sums):
    """A loss with another weight for each position and part."""
    return (i["weights"][0] * sums[1]).sum() + (i["weights"][1] * sums[2]).sum()


def dense_loss(i, acts, chosen, aux_chosen=None):
    acts_kept = acts * chosen
    residual = i["target"] - acts_kept @ i["W_dec"] - i["b_dec"]
    by_token = torch.stack([residual.square().sum(1), acts_kept.abs().sum(1)])
    by_position = torch.zeros(2, len(i["weights"][0]), dtype=acts.dtype).index_add(1, i["pos"], by_token)
    loss = (i["weights"] * by_position).sum()
    if aux_chosen is not None:
        loss = loss + (residual.detach() - (acts * aux_chosen) @ i["W_dec"]).square().sum()
    return loss


def sparse_loss(i, k, aux_k=0):
    code, aux = encode_topk(
        *(i[name] for name in ("x", "W_enc", "b_enc", "center", "mask", "pos")),
        k=k, aux_k=aux_k, aux_latents=i["aux_latents"],
    )  # fmt: skip
    squared_error, residual = reconstruct(code, i["W_dec"], i["b_dec"], i["target"])
    loss = weighted(i, position_loss(squared_error, code, i["pos"], len(i["weights"][0])))
    if aux is not None:
        loss = loss + reconstruct(aux, i["W_dec"], torch.zeros_like(i["b_dec"]), residual)[0].sum()
    return loss, code, aux


def chosen_by(code):
    return code.with_values(torch.ones_like(code.values)).to_dense().double()


def check_gradients(inputs, loss, inputs64, loss64, assert_close, limit=1e-5):
    names = [name for name in LEAVES if inputs[name] is not None and inputs[name].requires_grad]
    grads = torch.autograd.grad(loss, [inputs[name] for name in names])
    references = torch.autograd.grad(loss64, [inputs64[name] for name in names])
    assert_close(loss, loss64, limit, "loss")
    for name, grad, reference in zip(names, grads, references, strict=True):
        assert grad.dtype == inputs[name].dtype
        assert grad.stride() == inputs[name].stride() or 1 in grad.shape, name
        assert_close(grad, reference, limit, f"gradient of {name}")


@MASKS
def test_topk_step_with_aux(step_shape, backend, mask_kind, assert_close):
    inputs = draw(step_shape, mask_kind)
    loss, code, aux = sparse_loss(inputs, step_shape.K, aux_k=max(1, step_shape.K // 2))
    reference = in_float64(inputs)
    acts = dense_acts(reference)
    assert_close(code.values, acts.gather(1, code.indices.long()), name="values")
    assert not (aux.values > 0)[~inputs["aux_latents"][aux.indices]].any()
    loss64 = dense_loss(reference, acts, chosen_by(code), chosen_by(aux) * inputs["aux_latents"])
    check_gradients(inputs, loss, reference, loss64, assert_close)


@MASKS
def test_dense_step(step_shape, backend, mask_kind, assert_close):
    inputs = draw(step_shape, mask_kind)
    acts = encode_dense(*(inputs[name] for name in ("x", "W_enc", "b_enc", "center", "mask", "pos")))
    residual = inputs["target"] - acts @ inputs["W_dec"] - inputs["b_dec"]
    loss = weighted(inputs, position_loss(residual, acts, inputs["pos"], step_shape.T))
    reference = in_float64(inputs)
    acts64 = dense_acts(reference)
    assert_close(acts, acts64, name="acts")
    check_gradients(inputs, loss, reference, dense_loss(reference, acts64, 1), assert_close)


def test_sparse_decoder_of_any_code(step_shape, backend, make_code, dense, assert_close):
    code, inputs = make_code(step_shape), draw(step_shape)
    values = code.values.clone().requires_grad_()
    residual = decode_sparse(code.with_values(values), inputs["W_dec"], inputs["b_dec"])
    loss = weighted(inputs, position_loss(residual, code.with_values(values), inputs["pos"], step_shape.T))
    reference = in_float64(inputs) | dict(target=torch.zeros(step_shape.N, step_shape.D, dtype=torch.float64))
    acts = dense(code).requires_grad_()
    loss64 = dense_loss(reference, acts, 1)
    (dvalues,) = torch.autograd.grad(loss, values, retain_graph=True)
    (dacts,) = torch.autograd.grad(loss64, acts, retain_graph=True)
    used = code.values.numel() if code.offsets is None else int(code.offsets[-1])
    where = code.rows.flatten()[:used], code.indices.flatten()[:used].long()
    assert_close(dvalues.flatten()[:used], dacts[where], name="gradient of values")
    assert (dvalues.flatten()[used:] == 0).all()
    inputs, reference = ({name: i[name] for name in LEAVES} | dict(x=None, W_enc=None, b_enc=None, center=None)
                         for i in (inputs, reference))  # fmt: skip
    check_gradients(inputs, loss, reference, loss64, assert_close)


def test_float32_parameters_beside_float16_activations(step_shape, backend, assert_close):
    inputs = draw(step_shape)
    for name in ("x", "target", "W_enc", "W_dec"):
        rounded = inputs[name].detach().half()  # so that the products of both sides have the same operands
        inputs[name] = rounded if name in ("x", "target") else rounded.float()
        inputs[name].requires_grad_(name != "target")
    loss, code, _ = sparse_loss(inputs, step_shape.K)
    reference = in_float64(inputs)
    loss64 = dense_loss(reference, dense_acts(reference), chosen_by(code))
    check_gradients(inputs, loss, reference, loss64, assert_close, limit=5e-3)


def test_no_gradient_crosses_a_hard_mask(step_shape, backend):
    inputs = draw(step_shape, "hard mask")
    inputs["weights"][:, 1:] = 0  # only position 0 counts, and nothing from x but through the first half of the latents
    inputs["mask"][0] = torch.arange(step_shape.F) < step_shape.F // 2
    loss, *_ = sparse_loss(inputs, step_shape.K)
    dW_enc, db_enc, dW_dec = torch.autograd.grad(loss, [inputs[name] for name in ("W_enc", "b_enc", "W_dec")])
    assert (dW_enc[:, step_shape.F // 2 :] == 0).all()
    assert (db_enc[step_shape.F // 2 :] == 0).all()
    assert (dW_dec[step_shape.F // 2 :] == 0).all()


def test_same_bits_twice(step_shape, backend):
    runs = []
    for _ in range(2):
        inputs = draw(step_shape, "learnable mask")
        loss, *_ = sparse_loss(inputs, step_shape.K, aux_k=3)
        runs.append([loss, *torch.autograd.grad(loss, [inputs[name] for name in LEAVES])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_activations_of_all_latents_are_not_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(list(t.shape)) or t, lambda t: t):
        acts = torch.ones(11, 7, requires_grad=True)
        code, _ = encode_topk(acts, torch.ones(7, 13), torch.ones(13), k=3, aux_k=2, aux_latents=torch.arange(13) < 5)
    kept += [list(c.values.shape) for c in code.values.grad_fn.codes]
    assert [11, 7] in kept
    assert [11, 3] in kept
    assert [11, 13] not in kept


@pytest.mark.parametrize("kind", ["dense", "topk", "batchtopk", "jumprelu"])
def test_a_step_leaves_nothing_for_the_garbage_collector(kind):
    """A context that held what it gave back would keep batch after batch until cycles are looked for."""
    generator = torch.Generator().manual_seed(0)
    x, W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((20, 8), (8, 30), (30, 8)))
    W_enc.requires_grad_()
    b_enc, b_dec = torch.zeros(30, requires_grad=True), torch.zeros(8, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        if kind == "dense":
            values = encode_dense(x, W_enc, b_enc)
            loss = (x - values @ W_dec).square().sum()
        else:
            threshold = torch.full((30,), 0.5, requires_grad=True)
            if kind == "jumprelu":
                code = encode_jumprelu(x, W_enc, b_enc, threshold, bandwidth=0.1)[0]
            else:
                code = encode_topk(x, W_enc, b_enc, k=4, across_batch=kind == "batchtopk")[0]
            values = code.values
            squared_error, residual = reconstruct(code, W_dec, b_dec, x)
            loss = squared_error.sum() + decode_sparse(code, W_dec, b_dec).sum()
            del code, squared_error, residual
        seen = weakref.ref(values)
        loss.backward()
        del values, loss
        assert seen() is None
    finally:
        gc.enable()
