"""Order statistics as machine code, where llvmlite is installed (`pip install 'fedsim[compiled]'`).

A network of comparators on rows is bound by reading and writing the cache. Here it is straight-line code on as many
columns as a register holds, of which each value is read once; LLVM, which llvmlite brings along, makes it in about a
tenth of a second, so that nobody needs a compiler. It does what the walk of `fedsim.order` does, operation by
operation, and gives the same bits; which of the two is taken hangs on counted values alone.
"""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fedsim.networks import Statistic

WORTH = 1 << 26
"""Values of which a statistic has been asked before it is compiled: on so many the walk loses what LLVM takes."""

REGISTER = 32
"""Bytes of a register: AVX's, also where there are longer ones."""

OLDEST = 16
"""The first LLVM whose pointers have no type; llvmlite 0.45 has 20."""

KINDS = {torch.float32: "float", torch.float64: "double"}


class Machine:
    """A statistic as machine code.

    Args:
        statistic: what is computed.
        dtype: of the updates, of `KINDS`.

    Raises:
        RuntimeError: LLVM does not compile it for this machine.

    """

    def __init__(self, statistic: Statistic, dtype: torch.dtype) -> None:
        self.lanes = REGISTER // dtype.itemsize
        text = _Code(KINDS[dtype], self.lanes).function(statistic)
        self._engine = _engine(text)  # holds the code
        address = self._engine.get_function_address("statistic")
        pointer = ctypes.c_void_p
        self._call = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, ctypes.c_int64)(address)

    def __call__(self, values: Tensor, offsets: Tensor, out: Tensor) -> None:
        """Write the statistic of some rows of values to `out` (d,), d ≥ `lanes`; NaN where a column has one.

        Args:
            values: rows of neighbouring columns.
            offsets: (num_rows,) int64, where the rows that count begin, in entries from the first of `values`.
            out: (d,), contiguous.

        """
        self._call(values.data_ptr(), offsets.data_ptr(), out.data_ptr(), len(out))


_lock = Lock()
_asked: Counter[tuple[Statistic, torch.dtype]] = Counter()
_made: dict[tuple[Statistic, torch.dtype], Machine | None] = {}


def machine(statistic: Statistic, dtype: torch.dtype, columns: int) -> Machine | None:
    """Return a statistic as machine code; None where it is not worth it yet, or there is no llvmlite.

    Args:
        statistic: what is computed.
        dtype: of the updates.
        columns: of which it is asked now.

    """
    if dtype not in KINDS:
        return None
    key = statistic, dtype
    with _lock:
        if key not in _made:
            _asked[key] += statistic.num_rows * columns
            if _asked[key] < WORTH or _llvm() is None:
                return None
            try:
                _made[key] = Machine(statistic, dtype)
            except RuntimeError:  # LLVM's: the walk gives the same
                _made[key] = None
        return _made[key]


# --- LLVM -----------------------------------------------------------------------------------------------------------


@cache
def _llvm() -> Any:
    """Return LLVM, ready for this machine; None: there is none, or no fused multiply-add, with which torch sums."""
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):  # not installed, or its library does not load
        return None
    if llvm.llvm_version_info[0] < OLDEST:
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    return llvm if not features or "fma" not in features or features["fma"] else None


def _engine(text: str) -> Any:
    llvm = _llvm()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    module = llvm.parse_assembly(text)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    return engine


class _Code:
    """LLVM's text of a function on `lanes` columns at a time.

    Without fast-math flags LLVM keeps every operation and its order. A comparison and a choice are one instruction.
    """

    def __init__(self, kind: str, lanes: int) -> None:
        self.kind, self.lanes = kind, lanes
        self.vector = f"<{lanes} x {kind}>"
        self.lines: list[str] = []

    def function(self, statistic: Statistic) -> str:
        """Return void statistic(rows, offsets, out, columns)."""
        wires = self.read(statistic.num_rows)
        spoilt = self.spoilt(wires)
        for i, j, smaller, larger in statistic.comparators:
            a, b = wires[i], wires[j]
            if smaller:
                wires[i] = self.chosen("olt", a, b, a, b)
            if larger:
                wires[j] = self.chosen("ogt", a, b, a, b)
        made = self.finish(wires[statistic.low : statistic.high], statistic)
        made = self.op(
            f"select <{self.lanes} x i1> {spoilt}, {self.vector} {self.all(float('nan'))}, {self.vector} {made}"
        )
        body = "\n  ".join(self.lines)
        fma = f"@llvm.fma.v{self.lanes}f{8 * REGISTER // self.lanes}"
        return f"""
declare {self.vector} {fma}({self.vector}, {self.vector}, {self.vector})

define void @statistic(ptr %rows, ptr %offsets, ptr noalias %out, i64 %columns) {{
entry:
  %last = sub i64 %columns, {self.lanes}
  br label %loop
loop:
  %column = phi i64 [0, %entry], [%next, %loop]
  {body}
  %target = getelementptr {self.kind}, ptr %out, i64 %column
  store {self.vector} {made}, ptr %target, align 1
  %after = add i64 %column, {self.lanes}
  %short = icmp sgt i64 %after, %last
  %next = select i1 %short, i64 %last, i64 %after
  %done = icmp sge i64 %column, %last
  br i1 %done, label %end, label %loop
end:
  ret void
}}
"""

    def op(self, operation: str) -> str:
        """Add an operation and return its result's name."""
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name} = {operation}")
        return name

    def all(self, value: float) -> str:
        """Return a constant in all lanes; LLVM writes one of 32 bits in 64."""
        if self.kind == "float":
            value = struct.unpack("f", struct.pack("f", value))[0]
        bits = int.from_bytes(struct.pack(">d", value), "big")
        return "<" + ", ".join([f"{self.kind} 0x{bits:016X}"] * self.lanes) + ">"

    def chosen(self, compare: str, a: str, b: str, yes: str, no: str) -> str:
        """Return `yes` in the lanes where a is less ("olt") or greater ("ogt") than b, else `no`."""
        mask = self.op(f"fcmp {compare} {self.vector} {a}, {b}")
        return self.op(f"select <{self.lanes} x i1> {mask}, {self.vector} {yes}, {self.vector} {no}")

    def read(self, count: int) -> list[str]:
        """Return the values of `count` rows."""
        wires = []
        for row in range(count):
            place = self.op(f"getelementptr i64, ptr %offsets, i64 {row}")
            offset = self.op(f"load i64, ptr {place}, align 8")
            entry = self.op(f"add i64 {offset}, %column")
            source = self.op(f"getelementptr {self.kind}, ptr %rows, i64 {entry}")
            wires.append(self.op(f"load {self.vector}, ptr {source}, align 1"))
        return wires

    def spoilt(self, wires: Sequence[str]) -> str:
        """Return in which lanes a value is NaN."""
        found = ""
        for first in range(0, len(wires), 2):
            a, b = wires[first], wires[min(first + 1, len(wires) - 1)]
            mask = self.op(f"fcmp uno {self.vector} {a}, {b}")
            found = self.op(f"or <{self.lanes} x i1> {found}, {mask}") if found else mask
        return found

    def finish(self, rows: Sequence[str], statistic: Statistic) -> str:
        """Return what is made of the values of the wanted ranks."""
        if statistic.finish == "middle":
            return self.middle(rows)
        return self.mean(rows) if statistic.finish == "mean" else self.nearest(rows, statistic.kept)

    def middle(self, rows: Sequence[str]) -> str:
        half = self.all(0.5)
        low = self.op(f"fmul {self.vector} {rows[(len(rows) - 1) // 2]}, {half}")
        high = self.op(f"fmul {self.vector} {rows[len(rows) // 2]}, {half}")
        total = self.op(f"fadd {self.vector} {low}, {high}")
        return self.op(f"fadd {self.vector} {total}, {self.all(0.0)}")

    def mean(self, rows: Sequence[str]) -> str:
        scale, rest = shares(len(rows))
        fma = f"@llvm.fma.v{self.lanes}f{8 * REGISTER // self.lanes}"
        total = self.op(f"fmul {self.vector} {rows[0]}, {self.all(scale)}")
        for row in rows[1:]:
            total = self.op(
                f"call {self.vector} {fma}({self.vector} {row}, {self.vector} {self.all(scale)}, {self.vector} {total})"
            )
        total = self.op(f"fmul {self.vector} {total}, {self.all(rest)}")
        return self.op(f"fadd {self.vector} {total}, {self.all(0.0)}")

    def nearest(self, rows: Sequence[str], kept: int) -> str:
        center = self.middle(rows)
        window = list(rows[:kept])
        for rank in range(kept, len(rows)):
            low, high = window[rank % kept], rows[rank]
            above = self.op(f"fsub {self.vector} {high}, {center}")
            below = self.op(f"fsub {self.vector} {center}, {low}")
            window[rank % kept] = self.chosen("olt", above, below, high, low)
        return self.mean(window)


def shares(count: int) -> tuple[float, float]:
    """Return a power of two and what is left of 1 / count: values times the first sum up without overflow.

    Such products are exact, so that a fused multiply-add rounds like a product and a sum.
    """
    scale = 0.5 ** (count - 1).bit_length()
    return scale, 1 / (count * scale)
