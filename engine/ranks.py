"""Training in several processes, run by torchrun. Each has a share of the text and of every dictionary's latents."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.code import SparseCode
from ..kernels.select import select_batch_topk, select_topk
from .errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`, and its communication with the others.

    `group` sums and gathers tensors on the device. `host` exchanges numbers on the CPU. All processes must make the
    same calls in the same order. With a single process (`ALONE`) nothing is exchanged.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    host: Any = None

    @classmethod
    def here(cls) -> "Ranks":
        """Return the ranks of the running process group, or ALONE. All processes must call it."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, dist.new_group(backend="gloo"))

    @classmethod
    def start(cls) -> "Ranks":
        """Initialise the process group that torchrun started, with one GPU per process if there are GPUs."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return ALONE
        has_gpus, local_rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
        if has_gpus:
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun: --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} is not allowed; "
                    f"there are {torch.cuda.device_count()} GPUs"
                )
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if has_gpus else "gloo")
        return cls.here()

    def apart(self) -> "Ranks":
        """Return the same processes with their own communication group, whose calls may overlap with this one's."""
        return self if self.size == 1 else replace(self, group=dist.new_group())

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """Sum x over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def least_(self, x: Tensor) -> Tensor:
        """Take the minimum of x over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MIN, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Stack x of all processes, [size, ...]. All must have the same shape."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        # as bytes, because not every backend supports every dtype
        buffers = [buffer.reshape(-1).view(torch.uint8) for buffer in out.unbind()]
        dist.all_gather(buffers, x.contiguous().reshape(-1).view(torch.uint8), group=self.group)
        return out

    def rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """Concatenate x of all processes, [sum of counts, ...]. Process r has counts[r] entries."""
        if self.size == 1:
            return x
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([share[:count] for share, count in zip(self.gather(padded), counts, strict=True)])

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return this process's share of x along a dimension that `size` divides."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.rank].contiguous()

    def whole(self, x: Tensor, dim: int = 0) -> Tensor:
        """Concatenate the shares of all processes: the inverse of `own`."""
        return x if self.size == 1 else torch.cat(list(self.gather(x)), dim)

    def largest(self, number: int) -> int:
        """Return the maximum of a number over the processes, without synchronising the device."""
        if self.size == 1:
            return number
        maximum = torch.tensor(number)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.host)
        return int(maximum)

    def end(self) -> None:
        """Close the process group, once all processes get here."""
        if self.size > 1:
            self.wait()
            dist.destroy_process_group()

    def wait(self) -> None:
        self.largest(0)

    def own_state(self, state: dict[str, Tensor], dims: dict[str, int]) -> dict[str, Tensor]:
        """Replace the tensors named in `dims` by this process's share along that dimension."""
        return {name: self.own(x, dims[name]) if name in dims else x for name, x in state.items()}

    def whole_state(self, state: dict[str, Tensor], dims: dict[str, int]) -> dict[str, Tensor]:
        """Invert `own_state`. With several processes the result is on the CPU, to save device memory."""
        if self.size == 1:
            return state
        return {name: (self.whole(x, dims[name]) if name in dims else x).cpu() for name, x in state.items()}

    def keep_largest(self, code: SparseCode, k: int) -> SparseCode:
        """Keep the entries of a code that are among the k largest of their token over the latents of all processes. In
        a ragged code, keep those among the k largest of the batch. Codes have one shape. Ties go to lower ranks."""
        if self.size == 1:
            return code
        values = self.gather(code.live(code.values))
        if code.ragged:
            values = values.view(self.size, -1)
            selected = select_batch_topk(values, min(k, values.numel())).to_dense()[self.rank]
        else:
            values = values.movedim(0, 1).flatten(1)
            selected = select_topk(values, min(k, values.shape[1])).to_dense().chunk(self.size, 1)[self.rank]
        return code.only(selected != 0)


ALONE = Ranks()
