"""Pure functions of tensors that are called often: recorded once a shape, and replayed without Python in between.

What a function costs in Python, autograd and `torch.func` is paid when it is recorded; its operations, backward passes
among them, stay the same and so do its values.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from fedsim.engine.record import record
from fedsim.scripted import as_written

Function = Callable[[list[Tensor]], list[Tensor]]

MOST = 64  # programs that are kept; the least recently used goes first


class Replay:
    """Calls functions by their recorded programs, on a CPU; what cannot be recorded is called, and warned of."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, Function | None] = {}  # None: the function itself is called
        self.refused: str | None = None  # why a function could not be recorded, the last time

    def __call__(self, key: Hashable, function: Function, inputs: list[Tensor]) -> list[Tensor]:
        """Return what a function makes of some inputs.

        Args:
            key: of all that the function depends on beside its inputs.
            function: pure; may differentiate. Values must not decide what it does.
            inputs: on one device.

        """
        if any(value.device.type != "cpu" for value in inputs):
            return function(inputs)
        known = (key, *((tuple(value.shape), value.dtype) for value in inputs))
        if known not in self._programs:
            self._programs[known] = self._recorded(function, inputs)
            while len(self._programs) > MOST:
                del self._programs[next(iter(self._programs))]
        program = self._programs[known] = self._programs.pop(known)
        return (program or function)(inputs)

    def _recorded(self, function: Function, inputs: list[Tensor]) -> Function | None:
        """Record a function on other values than these, and hold the program against it on these."""
        try:
            program = compiled(function, [_other(value) for value in inputs])
            _hold(program(inputs), function(inputs))
        except Exception as error:  # whatever keeps it from being recorded, it can be called
            said, self.refused = self.refused, (str(error).splitlines() or [type(error).__name__])[0]
            if said is None:
                warnings.warn(
                    f"a function cannot be recorded, so Python runs it each time: {self.refused}", stacklevel=4
                )
            return None
        return program


def compiled(function: Function, inputs: list[Tensor]) -> Function:
    """Return the program of a function of tensors of these shapes, as TorchScript.

    Raises:
        NotRecordable: what the function does depends on a tensor's value, or on a global generator.

    """
    program = record(function, inputs)
    given = "inputs: List[Tensor], ahead: List[Tensor], constants: List[Tensor]"
    text = f"def run({given}) -> List[Tensor]:\n" + textwrap.indent(f"{program.body}\n", "    ")
    unit, constants = torch.jit.CompilationUnit(text), list(program.constants)

    def run(values: list[Tensor]) -> list[Tensor]:
        with as_written():
            results = unit.run(values, [], constants)
        return [result.clone() for result in results]  # what autograd may go on with

    return run


def _other(value: Tensor) -> Tensor:
    return value * 0.5 if value.is_floating_point() else value.clone()


def _hold(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        scale = b.abs().nan_to_num(posinf=0.0).max().clamp_min(1e-30) if b.is_floating_point() and b.numel() else 1
        if not torch.allclose(a / scale, b / scale, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ValueError("a recorded function differs from the function itself: it depends on more than its inputs")
