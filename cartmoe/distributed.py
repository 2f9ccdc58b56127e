"""Several processes that train one model, started by torchrun; one process is the same, alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Imported before there is a group, and not by DDP afterwards: the group of that moment becomes the
# default of its functions, so that the group's threads meet the interpreter's end and may abort it.
import torch.distributed.nn.functional
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and the device that it works on."""

    rank: int
    size: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, in place summed over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def from_first(self, value: Any) -> Any:
        """What the first process has, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device(self.device))
        return values[0]


@contextmanager
def ranks(device: str | None = None) -> Iterator[Ranks]:
    """The process group that the environment tells of (RANK, WORLD_SIZE, ... of torchrun), NCCL on
    GPUs and gloo otherwise. A group that is there already is used and left.

    device   default: the GPU of this process if there is one, else "cpu"
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if device is None or device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    own = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if own:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        alone = not dist.is_initialized()
        yield (
            Ranks(0, 1, device) if alone else Ranks(dist.get_rank(), dist.get_world_size(), device)
        )
    finally:
        if own:
            dist.destroy_process_group()
