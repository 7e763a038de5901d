"""The honest baselines: what a good programmer would write for one workload, without a framework."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import Workload


class TightLoop:
    """The leanest sequential loop on autograd.

    Parameters are updated in place with foreach ops, convolutions run channels-last, data is indexed from tensors
    on the device, and the mean is summed as clients finish.
    """

    def __init__(self, work: Workload) -> None:
        self.work, self.module = work, copy.deepcopy(work.module)
        convolves = any(isinstance(m, nn.Conv2d) for m in self.module.modules())
        layout = torch.channels_last if convolves else torch.contiguous_format
        self.module.to(memory_format=layout)
        self.x = work.x.contiguous(memory_format=layout)
        self.params = list(self.module.parameters())
        self.start = [p.detach().clone() for p in self.params]

    def __call__(self, number: int) -> Tensor:
        """Train the cohort and return the mean update (D,)."""
        params, lr = self.params, self.work.training.lr
        total = [torch.zeros_like(p) for p in params]
        for share, client in zip(self.work.weights(number).tolist(), self.work.batches(number), strict=True):
            with torch.no_grad():
                torch._foreach_copy_(params, self.start)
            for chosen in client:
                loss = functional.cross_entropy(self.module(self.x[chosen]), self.work.y[chosen])
                grads = torch.autograd.grad(loss, params)
                with torch.no_grad():
                    torch._foreach_add_(params, grads, alpha=-lr)
            with torch.no_grad():
                torch._foreach_add_(total, params, alpha=share)
        with torch.no_grad():
            torch._foreach_sub_(total, self.start)
        return torch.cat([t.flatten() for t in total])


class GraphedLoop(TightLoop):
    """The tight loop with a client's whole local round replayed as one CUDA graph: no launches, no Python in a step.

    Clients with equal batches share a graph. On a CPU, where there are no graphs, it runs what would be recorded.
    """

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.graphs: dict[tuple[int, ...], tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, number: int) -> Tensor:
        """Train the cohort and return the mean update (D,)."""
        total = [torch.zeros_like(p) for p in self.params]
        for share, client in zip(self.work.weights(number).tolist(), self.work.batches(number), strict=True):
            lengths = tuple(map(len, client))
            if lengths not in self.graphs:
                self.graphs[lengths] = self._record(lengths)
            replay, chosen = self.graphs[lengths]
            torch.cat(client, out=chosen)
            replay()
            with torch.no_grad():
                torch._foreach_add_(total, self.params, alpha=share)
        with torch.no_grad():
            torch._foreach_sub_(total, self.start)
        return torch.cat([t.flatten() for t in total])

    def _record(self, lengths: tuple[int, ...]) -> tuple[Callable[[], None], Tensor]:
        """Return what trains a client with batches of such lengths, and where its samples' positions go."""
        chosen = torch.zeros(sum(lengths), dtype=torch.int64, device=self.x.device)

        def train() -> None:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.start)
            for part in chosen.split(lengths):
                loss = functional.cross_entropy(self.module(self.x[part]), self.work.y[part])
                grads = torch.autograd.grad(loss, self.params)
                with torch.no_grad():
                    torch._foreach_add_(self.params, grads, alpha=-self.work.training.lr)

        if not chosen.is_cuda:
            return train, chosen
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose and allocate in their first calls, which no graph may record
                train()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train()
        return graph.replay, chosen


class HandLoop:
    """An MLP with one hidden layer: backward written out, gradients fused into the update."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.start = [p.detach().clone() for p in work.module.parameters()]  # W1, b1, W2, b2
        self.params = [p.clone() for p in self.start]

    def __call__(self, number: int) -> Tensor:
        """Train the cohort and return the mean update (D,)."""
        lr = self.work.training.lr
        w1, b1, w2, b2 = self.params
        total = [torch.zeros_like(p) for p in self.params]
        for client in self.work.batches(number):
            torch._foreach_copy_(self.params, self.start)
            for chosen in client:
                x, y = self.work.x[chosen], self.work.y[chosen]
                h = torch.addmm(b1, x, w1.T).relu_()
                g = torch.addmm(b2, h, w2.T).softmax(1)
                g[torch.arange(len(y)), y] -= 1
                g /= len(y)
                gh = g @ w2
                gh *= h > 0
                w2.addmm_(g.T, h, alpha=-lr)
                b2.sub_(g.sum(0), alpha=lr)
                w1.addmm_(gh.T, x, alpha=-lr)
                b1.sub_(gh.sum(0), alpha=lr)
            torch._foreach_add_(total, self.params, alpha=1 / self.work.cohort)
        torch._foreach_sub_(total, self.start)
        return torch.cat([t.flatten() for t in total])


class Limit:
    """The same samples through one model at the best batch size: no federation could be faster."""

    def __init__(self, work: Workload, batch_size: int = 500) -> None:
        self.loop, self.batch_size = TightLoop(work), batch_size

    def __call__(self, number: int) -> None:
        """Take one pass over the samples of a round's cohort."""
        loop = self.loop
        for chosen in torch.split(loop.work.samples(number), self.batch_size):
            loss = functional.cross_entropy(loop.module(loop.x[chosen]), loop.work.y[chosen])
            grads = torch.autograd.grad(loss, loop.params)
            with torch.no_grad():
                torch._foreach_add_(loop.params, grads, alpha=-loop.work.training.lr)
