"""Order statistics as machine code give the bits of the walk over the network, and only where they pay."""

from unittest import mock

import pytest
import torch

from fedsim import compiled, order
from fedsim.linalg import mapped

COUNTS = [(torch.float32, count) for count in (1, 2, 3, 4, 10, 31)] + [(torch.float64, count) for count in (2, 9)]
STATISTICS = {
    "median": lambda x: order.median(x),
    "trimmed mean": lambda x: order.trimmed_mean(x, (len(x) - 1) // 3),
    "around the median": lambda x: order.mean_around_median(x, len(x) - (len(x) - 1) // 3),
    "few around the median": lambda x: order.mean_around_median(x, 1 + len(x) // 4),
    "of some rows": lambda x: order.median(x, torch.arange(len(x)) % 3 != 1),
}


@pytest.fixture
def llvm(monkeypatch):
    pytest.importorskip("llvmlite", reason="the walk is the only one: pip install 'fedsim[compiled]'")
    if compiled._llvm() is None:
        pytest.skip("this machine's LLVM has no fused multiply-add")
    monkeypatch.setattr(compiled, "_made", {})
    monkeypatch.setattr(compiled, "_asked", compiled.Counter())


def hard_rows(count, size, dtype, seed=0):
    """Return rows (K, D) with ties, zeros of both signs, infinities, subnormal and nearly infinite values."""
    generator = torch.Generator().manual_seed(1000 * count + seed)
    rows = torch.randn(count, size, generator=generator, dtype=dtype)
    rows *= torch.randn(size, generator=generator, dtype=dtype).exp()
    largest = torch.finfo(dtype).max
    rows[:, ::7] = rows[:, ::7].round()
    rows[:, 1::7] = 0.0
    rows[::2, 1::7] = -0.0
    rows[:, 2::7] *= torch.finfo(dtype).tiny
    rows[: (count - 1) // 3, 3::7] = torch.inf
    rows[:, 4::7] *= largest / rows[:, 4::7].abs().amax()
    return rows


def both(monkeypatch, statistic):
    """Return what the walk and the machine code give, as integers."""
    found = []
    for worth in (1 << 60, 0):
        monkeypatch.setattr(compiled, "WORTH", worth)
        assert not compiled._made
        value = statistic()
        found.append(value.view({torch.float32: torch.int32, torch.float64: torch.int64}[value.dtype]))
    assert all(compiled._made.values())
    return found


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize(("dtype", "count"), COUNTS, ids=str)
def test_the_same_bits(llvm, monkeypatch, count, dtype, name):
    rows = hard_rows(count, 91, dtype)  # not a whole number of registers
    walk, code = both(monkeypatch, lambda: STATISTICS[name](rows))
    assert torch.equal(walk, code)


def test_the_same_bits_in_blocks_threads_and_slices(llvm, monkeypatch):
    monkeypatch.setattr(order, "WIDTH", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows = hard_rows(9, 300, torch.float32)[:, 17:]  # three columns, the last block, are less than a register
    assert torch.equal(*both(monkeypatch, lambda: order.trimmed_mean(rows[:, :195], 2)))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_the_same_bits_where_a_block_is_sorted(llvm, monkeypatch, value):
    monkeypatch.setattr(order, "WIDTH", 32)
    rows = hard_rows(9, 160, torch.float64)
    rows[4, 70] = value
    rows[3, 130] = value
    rows[4:, 100] = value
    rows[:4, 100] = -value
    assert torch.equal(*both(monkeypatch, lambda: order.median(rows)))
    want = order.median(torch.cat([rows[:, 64:96]] * 2, 1))
    assert torch.equal(order.median(rows)[64:96], want[:32])


def test_the_same_bits_of_mapped_rows(llvm, monkeypatch):
    rows = mapped(torch.rand(7, 9, generator=torch.Generator().manual_seed(0)), torch.randn(9, 200))
    assert torch.equal(*both(monkeypatch, lambda: order.mean_around_median(rows, 5)))


def test_compiled_once_it_pays(llvm, monkeypatch):
    monkeypatch.setattr(compiled, "WORTH", 3 * 100 * 4)
    rows = torch.randn(3, 100)
    for _ in range(3):
        order.median(rows)
    assert not compiled._made
    with mock.patch.object(compiled.Machine, "__call__") as call:
        order.trimmed_mean(rows, 1)  # another statistic is counted for itself
        call.assert_not_called()
        order.median(rows)
        call.assert_called_once()


def test_short_floats_and_many_rows_are_not_compiled(llvm, monkeypatch):
    monkeypatch.setattr(compiled, "WORTH", 0)
    order.median(torch.randn(5, 40).bfloat16())
    order.median(torch.randn(order.NETWORK + 1, 40))
    assert not compiled._made


def test_without_llvm_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_made", {})
    monkeypatch.setattr(compiled, "_llvm", lambda: None)
    monkeypatch.setattr(compiled, "WORTH", 0)
    assert order.median(torch.tensor([[3.0], [1.0], [2.0]]).expand(3, 40)).tolist() == [2.0] * 40
    assert not compiled._made


def test_what_llvm_refuses_is_walked(llvm, monkeypatch):
    def refuse(text):
        raise RuntimeError("LLVM ERROR")

    monkeypatch.setattr(compiled, "WORTH", 0)
    monkeypatch.setattr(compiled, "_engine", refuse)
    assert order.median(torch.arange(3.0)[:, None].repeat(1, 40)).tolist() == [1.0] * 40


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 100])
def test_shares(count):
    scale, rest = compiled.shares(count)
    assert scale * count <= 1
    assert 1 <= rest < 2
    assert scale * rest * count == pytest.approx(1, rel=1e-15)
