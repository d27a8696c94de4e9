"""Count the kernels that a command would compile, without a GPU.

    TRITON_INTERPRET=1 python -m temposae.bench.launches FILE MODULE [ARGUMENT...]

runs `python -m MODULE ARGUMENT...` and adds a line to FILE for each kernel that the interpreter ran and that a GPU
would compile on its own: kernel, constants, dtypes of tensors, and integers by what Triton specialises on.
"""

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def specialised(value: Any) -> str:
    """What a compiled kernel assumes about an argument that is no constant."""
    if hasattr(value, "data_ptr"):
        return f"{value.dtype}{'' if value.data_ptr() % 16 else ', aligned'}"
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else "int, a multiple of 16" if value % 16 == 0 else "int"
    return type(value).__name__


@contextmanager
def recorded(variants: set[str]) -> Iterator[None]:
    """Add each kernel that the interpreter runs in this context to `variants`."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def run_recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}
        arguments = {
            name: value if name in constants or name not in self.arg_names else specialised(value)
            for name, value in arguments.items()
        }
        variants.add(json.dumps({"kernel": self.fn.__name__} | arguments, default=str, sort_keys=True))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = run_recorded
    try:
        yield
    finally:
        InterpretedFunction.run = run


def speed_up_interpreter() -> None:
    """Let the interpreter patch triton.language once per module and launch, and work out types and shapes once.

    It patches at every call of a device function, which takes ten times as long as the call. Types of blocks, numpy types
    and shapes take 40% of the rest.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_and_call = interpreter.InterpretedFunction.__call__
    languages: dict[Any, list[Any]] = {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in languages:
            languages[self] = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages[self]):
            return patch_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    make_block, make_tensor, numpy_type = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}
    numpy_types: dict[str, Any] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        key = (element_ty.name, sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = (self.shape, self.numel, self.name)
        self.element_ty, self.sizes = element_ty, sizes
        self.shape, self.numel, self.name = blocks[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = type.sizes if type.is_block() else ()
        if sizes not in shapes:
            make_tensor(self, handle, type)
            shapes[sizes] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    def get_np_dtype(kind: Any) -> Any:
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    interpreter.InterpretedFunction.__call__ = call
    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor
    interpreter._get_np_dtype = get_np_dtype


def main() -> None:
    file, module, *arguments = sys.argv[1:]
    variants: set[str] = set()
    sys.argv = [module, *arguments]
    speed_up_interpreter()
    try:
        with recorded(variants):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        with open(file, "a") as out:
            out.writelines(f"{variant}\n" for variant in sorted(variants))


if __name__ == "__main__":
    main()
