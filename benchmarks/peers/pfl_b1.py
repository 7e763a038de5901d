"""B1 in pfl-research: FederatedAveraging on its SimulatedBackend, one process, no evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import protocol
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional

work = protocol.load(sys.argv[1])
order = work["order"]  # (K, steps, batch)
x, y = torch.from_numpy(work["x"]), torch.from_numpy(work["y"])


class Net(torch.nn.Module):
    """The workload's module with the two functions that pfl asks for."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def loss(self, x, y, eval=False):
        """Return the mean cross-entropy of a batch."""
        return functional.cross_entropy(self.module(x), y)

    def metrics(self, x, y, eval=True):
        """Return nothing: nobody evaluates."""
        return {}


class Stepper(TrainingProcessCallback):
    """Answers a line for every iteration, and puts the start weights back."""

    def __init__(self) -> None:
        self.commands, self.path, self.warm = None, None, False

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Hand over the update, then wait for the next line."""
        if self.path is not None:
            now = torch.cat([p.detach().flatten() for p in model.pytorch_model.parameters()])
            protocol.np.save(self.path, (now - torch.from_numpy(work["start"])).numpy())
        if self.commands is None:
            protocol.ready("pfl", "torch")
            self.commands = protocol.commands()
        with torch.no_grad():
            for parameter, start in zip(model.pytorch_model.parameters(), protocol.split(work), strict=True):
                parameter.copy_(torch.from_numpy(start))
        try:
            self.path = next(self.commands)
        except StopIteration:
            return True, Metrics()
        return False, Metrics()


def user(name: str) -> Dataset:
    """Return a user's samples in the order of its steps."""
    mine = torch.from_numpy(order[int(name)].ravel())
    return Dataset(raw_data=[x[mine], y[mine]], user_id=name)


names = [str(k) for k in range(len(order))]
users = {name: user(name) for name in names}
data = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", names))
net = Net(torch.load(Path(sys.argv[1]).with_name("module.pt"), weights_only=False))
model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
train = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=float(work["lr"]), local_batch_size=order.shape[2])
rounds = NNAlgorithmParams(
    central_num_iterations=10**9, evaluation_frequency=10**9, train_cohort_size=len(order), val_cohort_size=None
)
FederatedAveraging().run(
    rounds, SimulatedBackend(data, data), model, train, callbacks=[Stepper()], send_metrics_to_platform=False
)
