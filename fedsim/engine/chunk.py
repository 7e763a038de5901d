"""The local round of a chunk of rows, trained together in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.engine.batches import Step, steps
from fedsim.engine.gradients import Gradient
from fedsim.engine.graphs import Graphs
from fedsim.engine.laid import Laid, Plan
from fedsim.engine.situation import Situation
from fedsim.engine.stepping import Stepping
from fedsim.engine.task import BUFFER, LOCAL, Block, Job, Task
from fedsim.layout import Params
from fedsim.local import Int64


class Chunk:
    """Some rows of a job, longest first.

    Args:
        task: what all rounds share.
        job: the rows.
        laid: what they do.
        rows: (R,) positions in the job, in descending number of steps.
        gradient: what differentiates their loss.
        graphs: what replays their steps, where that was asked for.

    """

    def __init__(self, task: Task, job: Job, laid: Laid, rows: Int64, gradient: Gradient,
        graphs: Graphs | None = None,
    ) -> None:  # fmt: skip
        self.task, self.job, self.plans, self.rows = task, job, laid.plans, rows
        self.graphs = graphs
        self.where = torch.from_numpy(rows).to(task.device)  # (R,)
        self.keys = laid.keys[self.where]  # (R,)
        self.state = {name: value[self.where] for name, value in job.state.items()}
        versions = job.received[rows].tolist()
        self.single = len(set(versions)) == 1
        self.start = job.models[versions[0]] if self.single else torch.stack([job.models[v] for v in versions])
        split = task.shared.split(self.start)
        self.received = {n: v.expand(len(rows), *v.shape) for n, v in split.items()} if self.single else split
        self.sent = [job.broadcasts.get(version, {}) for version in versions]
        mu = float(self.sent[0].get("proximal_mu", getattr(task.objective, "proximal_mu", 0.0)))
        self.stepping = Stepping(task, gradient, self.keys, self.received, job.lr, mu)

    def train(self, out: Tensor, block: Block) -> None:
        """Train in place in out (R, D), which ends as the updates; the rest goes into the job's block."""
        out.copy_(self.start)
        params = self.task.shared.split(out)
        params |= {name: self.state[LOCAL + name] for name in self.task.local.names}
        situation = None
        for plan in self.plans:
            situation = self._situation(plan)
            self._phase(plan, params, situation)
        trained = {name: value.clone() for name, value in params.items()} if self._finishes else {}
        out.sub_(self.start)
        # Not `dot` or `vecdot`: where a row begins in memory decides in which order they sum it.
        block.square_norms[self.where] = torch.linalg.vector_norm(out, dim=1).square()  # (R,)
        mean = self.stepping.losses / self.stepping.seen.clamp(min=1)  # (R,)
        block.extras["train_loss"][self.where] = mean.to(self.task.dtype)
        if self._finishes and situation is not None:
            self._finish(trained, situation, block)
        for name, value in self.state.items():
            block.state[name][self.where] = value

    @property
    def _finishes(self) -> bool:
        return hasattr(self.task.objective, "finish")

    def _situation(self, plan: Plan) -> Situation:
        device = self.task.device
        stacked: dict[str, Any] = {
            "received": self.received,
            "client_state": {n: v for n, v in self.state.items() if not n.startswith((LOCAL, BUFFER))},
            "num_steps": torch.from_numpy(plan.schedule.num_steps[self.rows]).to(device),
            "num_samples": torch.from_numpy(plan.schedule.sizes[self.rows]).to(device),
            "key": self.keys,
        }
        if self.single:
            return Situation(self.task, plan.number, self.job.lr, stacked, self.sent[0])
        names = self.sent[0].keys()
        stacked["broadcast"] = {n: torch.stack([self._tensor(s[n]) for s in self.sent]) for n in names}
        return Situation(self.task, plan.number, self.job.lr, stacked)

    def _tensor(self, value: Any) -> Tensor:
        """Return what a rule sent as a tensor; a number in the run's precision."""
        dtype = self.task.dtype if isinstance(value, float) else None
        return torch.as_tensor(value, dtype=dtype).to(self.task.device)

    def _phase(self, plan: Plan, params: Params, situation: Situation) -> None:
        """Run the steps of a phase in place in params (R, *shape)."""
        listed: Iterable[Step] = steps(plan.schedule, self.rows, self.task.device, self.task.dtype)
        if self.graphs is not None and self.graphs.run(self.stepping, plan, params, listed := list(listed)):
            return
        take = self.stepping.begin(plan, params, situation)
        for step in listed:
            take(step)

    def _finish(self, trained: Params, situation: Situation, block: Block) -> None:
        """Let the objective end the rows: what they keep, send beside the update, and weigh."""
        finish = self.task.objective.finish
        last = max(int(self.plans[situation.number].schedule.num_steps[self.rows].max()) - 1, 0)
        weighs = []

        def end(p: Params, mine: Mapping[str, Any]) -> Any:
            kept, extras, weight = finish(p, situation.context(mine, last))
            weighs.append(weight is not None)
            return kept, extras, torch.as_tensor(0.0 if weight is None else weight, dtype=torch.float64)

        kept, extras, weight = vmap(end)(trained, situation.first(len(self.rows)))
        self.state.update(kept)
        for name, value in extras.items():
            room = value.new_zeros(len(block.weights), *value.shape[1:])
            block.extras.setdefault(name, room)[self.where] = value  # at once: another thread's chunk does the same
        if weighs[-1]:
            block.weights[self.where] = weight.double()
