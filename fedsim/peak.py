"""How much memory something takes beyond what was there."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch

from fedsim import heap


class Peak:
    """Measures the peak of memory while it is entered, beyond what was held before.

    On CUDA the allocator tells; on Linux the kernel, which counts this process alone. Elsewhere nothing does.

    Args:
        device: where the arrays are, e.g. "cpu" or "cuda:1".

    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes: int | None = None  # known once it is left

    def __enter__(self) -> Self:
        """Note what is held."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            heap.give_back()  # what is kept would not count when it is taken again
            self._before = _resident("VmRSS") if _forget_peak() else None
        return self

    def __exit__(self, *_: object) -> None:
        """Note the peak."""
        if self._before is None:
            return
        on_gpu = self.device.startswith("cuda")
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else _resident("VmHWM")
        self.bytes = None if peak is None else max(0, peak - self._before)


def _forget_peak() -> bool:
    """Let the kernel begin anew with this process's peak; say whether it does (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    """Return a figure of this process in bytes: VmRSS, what is resident, or VmHWM, the peak of it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
