"""The processes of one training run: this one alone, or those that `torchrun` or `accelerate launch` has started.

Each holds the whole model and takes a part of every effective batch. What they tell each other is summed: z0's
log-prob ratios, gradients, and whether anyone has run out of memory or of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

T = TypeVar("T")


class OutOfMemory(RuntimeError):
    """A process of the run had too little memory; raised in all of them."""


class Ranks:
    """This process and the others; with one process every method is the identity."""

    def __init__(self) -> None:
        # Also makes `cuda` mean this process' own device. NCCL where there is CUDA, gloo elsewhere.
        self._state: Any = PartialState(cpu=not torch.cuda.is_available())
        self.index = int(self._state.process_index)
        self.count = int(self._state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.index == 0

    def part(self, size: int) -> slice:
        """This process' share of `size` things that stand in an order: neighbours stay together."""
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over all processes in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Every parameter's gradient becomes the sum of all processes'; where one has none it counts as 0."""
        if self.count == 1:
            return
        trained = list(parameters)
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
        pieces = torch.split(self.sum(flat), [p.numel() for p in trained])
        for parameter, piece in zip(trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it holds in any process."""
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item()) if self.count > 1 else flag

    def gather(self, value: T) -> list[T]:
        """Every process' value, by index."""
        if self.count == 1:
            return [value]
        found: list[T] = gather_object([value])
        return found

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The others come in once the first process has left."""
        with self._state.main_process_first():
            yield

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()

    @contextmanager
    def failing_together(self, device: torch.device) -> Iterator[None]:
        """Where memory runs out in one process, all of them raise OutOfMemory: none waits for what another gave up."""
        short: RuntimeError | None = None
        try:
            yield
        except RuntimeError as exc:
            if not _is_out_of_memory(exc):
                raise
            short = exc
        if self.any(short is not None, device):
            raise OutOfMemory("out of memory in one of the processes" if short is None else str(short)) from short


def _is_out_of_memory(exc: RuntimeError) -> bool:
    return isinstance(exc, torch.OutOfMemoryError) or "can't allocate memory" in str(exc)  # the CPU's allocator
