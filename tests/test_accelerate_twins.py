"""An accelerated dictionary beside a twin that isn't: the same in every way in which torch lets it be used."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from temposae import accelerate, deaccelerate
from temposae.engine.accelerate import eligibility, is_accelerated
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from .peers import DICTIONARIES, D, data, no_batch_is_too_small, trainer

pytestmark = pytest.mark.slow
N = 40
Use = Callable[[Any, Tensor], Any]
#: one kind of each library's classes that go different ways
MAIN = (
    "saelens topk, counting norms", "saelens topk, layer norm", "saelens jumprelu", "saelens gated",
    "saelens skip transcoder", "saelens matryoshka training", "dictionary_learning topk", "dictionary_learning jumprelu",
    "dictionary_learning gated", "sparsify", "sparsify with skip",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alike_every_time(monkeypatch):
    no_batch_is_too_small(monkeypatch)
    torch.manual_seed(0)


def twins(kind: str) -> tuple[Any, Any]:
    one = DICTIONARIES[kind]()
    return one, accelerate(copy.deepcopy(one))


def flat(found: Any) -> list[Any]:
    """Leaves of what a call gave. sparsify's latents come in no particular order, so those are put in one."""
    if hasattr(found, "_fields"):
        found = found._asdict()
        indices = next((name for name in found if name.endswith("_indices")), None)
        if indices is not None:
            order = found[indices].argsort(-1)
            acts = indices.replace("indices", "acts")
            found |= {name: found[name].gather(-1, order) for name in (acts, indices)}
        found = list(found.values())
    if isinstance(found, tuple | list):
        return [leaf for one in found for leaf in flat(one)]
    if isinstance(found, dict):
        return [leaf for name in found for leaf in (name, *flat(found[name]))]
    return [found]


def outputs(sae: Any, x: Tensor) -> Any:
    """sparsify's own encode goes through the library, and gives pre-activations too."""
    return [sae.encode(x)[:2] if hasattr(sae, "num_latents") else sae.encode(x), sae(x)]


def loss_of(found: Any) -> Tensor:
    tensors = [one for one in flat(found) if isinstance(one, Tensor) and one.is_floating_point() and one.requires_grad]
    weighted = ((one * torch.linspace(0.5, 1.5, one.numel()).view_as(one)).square().mean() for one in tensors)
    return sum(weighted, torch.zeros(()))


def gradients(sae: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    sae.zero_grad()
    found = sae(x)
    loss_of(found).backward()
    return {"out": found, "x": x.grad, **{name: p.grad for name, p in sae.named_parameters() if p.grad is not None}}


def outcome(use: Use, sae: Any, x: Tensor) -> Any:
    try:
        return flat(use(sae, x))
    except Exception as error:
        return type(error).__name__


def alike(found: Any, expected: Any, what: str = "", rtol: float = 1e-5) -> None:
    if not isinstance(expected, list):
        assert found == expected, what
        return
    assert isinstance(found, list), f"{what}: {found}"
    assert len(found) == len(expected), what
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        where = f"{what} [{i}]"
        if not isinstance(other, Tensor):
            assert one == other, where
            continue
        about = [(t.dtype, t.shape, t.requires_grad, t.is_inference()) for t in (one, other)]
        assert about[0] == about[1], where
        one, other = one.detach().double(), other.detach().double()
        if not bool(other.isfinite().all()):
            assert torch.equal(other.isfinite(), one.isfinite()), where
            one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
        assert float((one - other).norm()) <= rtol * float(other.norm()) + 1e-30, where


def ours_ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever our ops took a call."""
    from temposae.kernels import ops

    calls: list[int] = []
    for name in ("encode_topk", "encode_threshold", "encode_batch_topk"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, real=real, **k: calls.append(1) or real(*a, **k))
    return calls


def on_strided(sae: Any, x: Tensor) -> Any:
    wide = torch.zeros(len(x), 2 * D)
    wide[:, ::2] = x
    return [outputs(sae, one) for one in (wide[:, ::2], x.T.contiguous().T, x[::2], x[:1].expand(9, D))]


def without_gradients_of_parts(sae: Any, x: Tensor) -> Any:
    found = []
    for p in sae.parameters():
        p.requires_grad_(False)
        found.append(gradients(sae, x))
        p.requires_grad_(True)
    sae.requires_grad_(False)
    return found, outputs(sae, x)


def twice_backward(sae: Any, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    inputs = [x, *sae.parameters()]
    first = torch.autograd.grad(loss_of(sae(x)), inputs, create_graph=True, allow_unused=True)
    total = loss_of([one for one in first if one is not None])
    second = torch.autograd.grad(total, inputs, allow_unused=True)
    return [one if one is not None else "none" for one in (*first, *second)]


def of_activations_twice(sae: Any, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    found = sae.encode(x)
    (first,) = torch.autograd.grad(loss_of(found), x, create_graph=True)
    return first, torch.autograd.grad(loss_of(first), sae.parameters(), allow_unused=True)[-1] is None


def in_place(sae: Any, x: Tensor) -> Any:
    found = flat(sae(x))[0]
    found.mul_(2).add_(1)
    found.square().sum().backward()
    return found, [p.grad for p in sae.parameters() if p.grad is not None]


def retained(sae: Any, x: Tensor) -> Any:
    found = loss_of(sae(x))
    found.backward(retain_graph=True)
    found.backward()
    return [p.grad for p in sae.parameters() if p.grad is not None]


def changed_before_backward(sae: Any, x: Tensor) -> Any:
    found = loss_of(sae(x.clone().requires_grad_()))
    with torch.no_grad():
        sae.W_dec.mul_(2) if hasattr(sae, "W_dec") else sae.decoder.weight.mul_(2)
    found.backward()


def dual(sae: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        found = flat(sae(forward_ad.make_dual(x, torch.ones_like(x))))[0]
        return list(forward_ad.unpack_dual(found))


def jvp_of_parameters(sae: Any, x: Tensor) -> Any:
    values = {name: p.detach() for name, p in sae.named_parameters()}
    run = lambda values: flat(torch.func.functional_call(sae, values, (x,)))[0]
    return torch.func.jvp(run, (values,), ({name: torch.ones_like(p) for name, p in values.items()},))


def mapped(sae: Any, x: Tensor) -> Any:
    run = lambda x: flat(sae(x))[0]
    return torch.func.vmap(run)(x.view(4, -1, D)), torch.func.jacrev(run)(x[:2])


def functional(sae: Any, x: Tensor) -> Any:
    values = {name: (1.5 * p.detach()).requires_grad_() for name, p in sae.named_parameters()}
    found = torch.func.functional_call(sae, values, (x,))
    first = torch.autograd.grad(loss_of(found), list(values.values()), create_graph=True, allow_unused=True)
    total = loss_of([one for one in first if one is not None])
    second = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    by_func = torch.func.grad(lambda values: loss_of(torch.func.functional_call(sae, values, (x,))))(
        {name: value.detach() for name, value in values.items()}
    )
    return found, first, ["none" if one is None else one for one in second], by_func


def checkpointed(sae: Any, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    found = checkpoint(sae, x, use_reentrant=False)
    loss_of(found).backward()
    return found, x.grad, [p.grad for p in sae.parameters() if p.grad is not None]


def saving_hooks(sae: Any, x: Tensor) -> Any:
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        return sae(x), saved


def counted(sae: Any, x: Tensor) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        sae(x)
    return counter.get_total_flops()


def within(make: Callable[[], Any]) -> Use:
    def use(sae: Any, x: Tensor) -> Any:
        with make():
            return outputs(sae, x)

    return use


def default_float64(sae: Any, x: Tensor) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return outputs(sae, x)
    finally:
        torch.set_default_dtype(torch.float32)


def deterministic(sae: Any, x: Tensor) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return gradients(sae, x)
    finally:
        torch.use_deterministic_algorithms(False)


def modes_of_the_module(sae: Any, x: Tensor) -> Any:
    return outputs(sae.eval(), x), sae.training, outputs(sae.train(), x), sae.training


def parametrized(sae: Any, x: Tensor) -> Any:
    class Double(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return 2 * W

    place, name = (sae, "W_enc") if hasattr(sae, "W_enc") else (sae.encoder, "weight")
    parametrize.register_parametrization(place, name, Double())
    return gradients(sae, x)


def pruned(sae: Any, x: Tensor) -> Any:
    place, name = (sae, "W_enc") if hasattr(sae, "W_enc") else (sae.encoder, "weight")
    prune.l1_unstructured(place, name, amount=0.5)
    return outputs(sae, x)


def loaded_state(sae: Any, x: Tensor) -> Any:
    state = {name: 0.5 * value for name, value in sae.state_dict().items()}
    sae.load_state_dict(state)
    return list(state), outputs(sae, x)


def moved(dtype: torch.dtype) -> Use:
    def use(sae: Any, x: Tensor) -> Any:
        sae.to(dtype)
        return flat(sae.encode(x.to(dtype)))[0].dtype, flat(sae(x.to(dtype)))[0].dtype, outputs(sae, x)

    return use


USES: dict[str, Use] = {
    "calls": outputs,
    "gradients": gradients,
    "a vector": lambda sae, x: outputs(sae, x[0]),
    "a row": lambda sae, x: outputs(sae, x[:1]),
    "rows of rows": lambda sae, x: (gradients(sae, x.view(2, -1, D)), outputs(sae, x.view(2, 2, -1, D))),
    "nothing": lambda sae, x: outputs(sae, x[:0]),
    "another width": lambda sae, x: outputs(sae, x[:, :-1]),
    "strided": on_strided,
    "bfloat16 x": lambda sae, x: outputs(sae, x.bfloat16()),
    "float64 x": lambda sae, x: outputs(sae, x.double()),
    "whole numbers": lambda sae, x: outputs(sae, x.long()),
    "float16": moved(torch.float16),
    "float64": moved(torch.float64),
    "half": lambda sae, x: sae.half() and outputs(sae, x),
    "parts without gradients": without_gradients_of_parts,
    "differentiated twice": twice_backward,
    "activations differentiated twice": of_activations_twice,
    "changed in place": in_place,
    "retained": retained,
    "changed before backward": changed_before_backward,
    "forward mode": dual,
    "jvp": jvp_of_parameters,
    "vmap": mapped,
    "functional": functional,
    "checkpoint": checkpointed,
    "saved tensors": saving_hooks,
    "flops": counted,
    "inference mode": within(torch.inference_mode),
    "no_grad": within(torch.no_grad),
    "default device": within(lambda: torch.device("cpu")),
    "inference x": lambda sae, x: outputs(sae.requires_grad_(False), made_in_inference_mode(x)),
    "inference x, gradients": lambda sae, x: outputs(sae, made_in_inference_mode(x)),
    "default float64": default_float64,
    "deterministic": deterministic,
    "train and eval": modes_of_the_module,
    "parametrized": parametrized,
    "pruned": pruned,
    "state": loaded_state,
    "copy": lambda sae, x: outputs(copy.deepcopy(sae), x),
    "pickle": lambda sae, x: outputs(pickle.loads(pickle.dumps(sae)), x),
    "torch.save": lambda sae, x: outputs(saved_and_loaded(sae), x),
    "twice accelerated": lambda sae, x: outputs(accelerate(sae) if is_accelerated(sae) else sae, x),
    "undone": lambda sae, x: outputs(deaccelerate(sae), x),
    "signature": lambda sae, x: [str(inspect.signature(getattr(sae, name))) for name in ("encode", "forward", "decode")],
    "names": lambda sae, x: [type(sae).__name__, type(sae).__module__, repr(sae), sae.encode.__doc__ or "", list(vars(sae))],
}  # fmt: skip


def made_in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def saved_and_loaded(sae: Any) -> Any:
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_twins_are_alike(kind, use):
    plain_one, fast = twins(kind)
    expected = outcome(USES[use], plain_one, data(n=N))
    alike(outcome(USES[use], fast, data(n=N)), expected, f"{kind}, {use}")


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_our_ops_take_what_is_plain(kind, monkeypatch):
    calls, fast = ours_ran(monkeypatch), twins(kind)[1]
    with torch.set_grad_enabled(kind != "saelens jumprelu training"):  # whose training pass has its own tests
        fast(data(n=N))
    assert calls
    assert eligibility.takes(fast, data(n=N))


def watched(sae: Any, x: Tensor, name: str, register: str) -> list[Any]:
    """What a hook on one module saw, in order, and what came out."""
    seen: list[Any] = []

    def hook(module: nn.Module, *values: Any) -> None:
        tensors = [one.detach().clone() if one is not None else "none" for value in values for one in
                   (value if isinstance(value, tuple) else (value,)) if isinstance(one, Tensor | None)]  # fmt: skip
        seen.append([name, register, *tensors])

    handle = getattr(dict(sae.named_modules())[name], register)(hook)
    try:
        found = gradients(sae, x)
        encoded = sae.encode(x)
    finally:
        handle.remove()
    return flat([seen, found, encoded[:2] if isinstance(encoded, tuple) else encoded])


HOOKS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
)  # fmt: skip


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_hooks_on_every_module_see_the_same(kind, register):
    plain_one, fast = twins(kind)
    for name, module in plain_one.named_modules():
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            expected = watched(plain_one, data(n=N), name, register)
            alike(watched(fast, data(n=N), name, register), expected, f"{kind}, {name}")


@pytest.mark.parametrize("kind", [kind for kind in DICTIONARIES if kind.startswith("saelens")])
def test_hook_points_are_passed_in_the_same_order(kind):
    def passed(sae: Any) -> list[Any]:
        seen: list[Any] = []
        note = lambda way: (
            lambda value, hook: seen.append([way, hook.name, value[0] if isinstance(value, tuple) else value])
        )
        points = list(sae.hook_dict)
        with sae.hooks(
            fwd_hooks=[(name, note("forward")) for name in points],
            bwd_hooks=[(name, note("backward")) for name in points],
        ):
            gradients(sae, data(n=N))
        _, cache = sae.run_with_cache(data(n=N))
        return flat([seen, dict(cache)])

    plain_one, fast = twins(kind)
    alike(passed(fast), passed(plain_one), kind)


def test_global_hooks_are_called(monkeypatch):
    for kind in MAIN:
        counts = []
        for sae in twins(kind):
            seen: list[str] = []
            handle = nn.modules.module.register_module_forward_hook(
                lambda m, *_, seen=seen: seen.append(type(m).__name__)
            )
            sae(data(n=N))
            handle.remove()
            counts.append(seen)
        assert counts[0] == counts[1]


def doubled(method: Any) -> Any:
    def method_of_the_user(self: Any, *args: Any, **named: Any) -> Any:
        found = method(self, *args, **named)
        if not isinstance(found, tuple):
            return 2 * found
        more = [2 * one if one.is_floating_point() else one for one in found]
        return type(found)(*more) if hasattr(found, "_fields") else tuple(more)

    return method_of_the_user


@pytest.mark.parametrize("name", ["encode", "decode", "forward"])
@pytest.mark.parametrize("kind", MAIN)
def test_replaced_methods_are_called(kind, name, monkeypatch):
    plain_one, fast = twins(kind)
    before = outcome(lambda sae, x: sae(x), plain_one, data(n=N))
    own = type(plain_one)
    for sae in (plain_one, fast):  # on the object
        monkeypatch.setattr(sae, name, doubled(getattr(own, name)).__get__(sae), raising=False)
    expected = outcome(lambda sae, x: sae(x), plain_one, data(n=N))
    alike(outcome(lambda sae, x: sae(x), fast, data(n=N)), expected, kind)
    assert name == "encode" or not torch.equal(expected[0], before[0])
    monkeypatch.undo()
    no_batch_is_too_small(monkeypatch)
    assert eligibility.takes(fast, data(n=N))
    monkeypatch.setattr(own, name, doubled(getattr(own, name)))  # on the class
    expected = outcome(lambda sae, x: sae(x), plain_one, data(n=N))
    alike(outcome(lambda sae, x: sae(x), fast, data(n=N)), expected, kind)
    late = accelerate(copy.deepcopy(deaccelerate(fast)))
    alike(outcome(lambda sae, x: sae(x), late, data(n=N)), expected, kind)


@pytest.mark.parametrize("kind", MAIN)
def test_replaced_modules_are_called(kind):
    found = []
    for sae in twins(kind):
        for name, module in list(sae.named_children()):
            if isinstance(module, nn.ModuleDict):
                continue
            setattr(sae, name, nn.Sequential(module, nn.Softsign()))
            found.append(outcome(lambda sae, x: sae(x), sae, data(n=N)))
            setattr(sae, name, module)
    half = len(found) // 2
    for one, other in zip(found[half:], found[:half], strict=True):
        alike(one, other, kind)


@pytest.mark.parametrize("kind", MAIN)
def test_compiled_in_one_graph_where_the_library_is(kind):
    def compiled(sae: Any, x: Tensor) -> Any:
        torch._dynamo.reset()
        return torch.compile(sae, fullgraph=True, backend="eager")(x)

    plain_one, fast = twins(kind)
    try:
        expected = flat(compiled(plain_one, data(n=N)))
    except Exception as error:
        with pytest.raises(type(error)):
            compiled(fast, data(n=N))
    else:
        alike(flat(compiled(fast, data(n=N))), expected, kind)


@pytest.mark.parametrize("spoil", ["hook on the dictionary", "another dictionary", "replaced loss", "replaced encode"])
@pytest.mark.parametrize("kind", ["topk", "standard", "jumprelu", "gated"])
def test_trainers_with_something_replaced_are_alike(kind, spoil):
    plain_one = trainer(kind)
    fast = accelerate(copy.deepcopy(plain_one))
    found = []
    for one in (plain_one, fast):
        seen: list[int] = []
        if spoil == "hook on the dictionary":
            one.ae.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        elif spoil == "another dictionary":
            one.ae = copy.deepcopy(plain_one.ae)
        elif spoil == "replaced loss":
            one.loss = lambda x, step=None, one=one, **others: 2 * type(one).loss(one, x, step=step, **others)
        else:
            one.ae.encode = doubled(type(one.ae).encode).__get__(one.ae)
        found.append(flat([one.loss(data(n=N), step=1), seen]))
    alike(found[1], found[0], spoil)
