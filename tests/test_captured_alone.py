"""With one thread captured steps run in the caller's: nothing is handed to a pool, and no bit differs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fedsim
from fedsim.engine.captured import Captured

WORDS = ("data=blobs", "data.num_samples=120", "partition.num_clients=20", "model=mlp", "model.hidden=[8]",
         "num_rounds=2", "fraction=1", "engine=vectorized", "engine.kernels=captured", "threads=1")  # fmt: skip


@pytest.mark.parametrize("strategy", ["fedavg", "krum"])  # rows that are summed as they end, and rows that are held
def test_one_thread_is_the_callers_own(strategy, tmp_path, monkeypatch):
    handed, submit = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda self, *a: handed.append(a) or submit(self, *a))
    weights = []
    for alone in (True, False):
        with monkeypatch.context() as patch:
            if not alone:
                patch.setattr(Captured, "_alone", lambda self: False)
            result = fedsim.simulate(*WORDS, f"strategy={strategy}", f"hydra.run.dir={tmp_path / str(alone)}")
        assert bool(handed) is not alone
        weights.append(torch.cat([p.detach().flatten() for p in result.model.parameters()]))  # (D,)
    assert torch.equal(*weights)
