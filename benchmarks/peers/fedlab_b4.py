"""B4 in FedLab 1.3.0: its serial client trainer and its synchronous server."""

from __future__ import annotations

import copy
import importlib.machinery
import sys
import types
from pathlib import Path

import protocol
import torch
from torch.utils.data import DataLoader, TensorDataset


class Absent(types.ModuleType):
    """A package that is imported for what is not used here: any name in it is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str):
        """Return a class: others derive from it."""
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


VISION = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.utils", "torchvision.models")
for name in (*VISION, "pynvml", "PIL", "PIL.Image", "sklearn", "sklearn.datasets", "tqdm"):
    sys.modules[name] = Absent(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer  # noqa: E402
from fedlab.contrib.algorithm.basic_server import SyncServerHandler  # noqa: E402
from fedlab.utils.logger import Logger  # noqa: E402

work = protocol.load(sys.argv[1])
x, y, order = torch.from_numpy(work["x"]), torch.from_numpy(work["y"]), work["order"]  # order (K, steps, batch)
start = torch.from_numpy(work["start"])


class Clients:
    """The clients' samples in the order of their steps."""

    def get_dataloader(self, client: int, batch_size: int) -> DataLoader:
        """Return a client's batches."""
        mine = torch.from_numpy(order[client].ravel())
        return DataLoader(TensorDataset(x[mine], y[mine]), batch_size=batch_size)


def one_round():
    """Do one round from the start weights; return the mean update."""
    module.load_state_dict(first)
    handler = SyncServerHandler(copy.deepcopy(module), global_round=10**9, sample_ratio=1.0, logger=quiet)
    handler.num_clients = len(order)
    trainer.local_process(handler.downlink_package, range(len(order)))
    for package in trainer.uplink_package:
        handler.load(package)
    return (handler.model_parameters - start).numpy()


module = torch.load(Path(sys.argv[1]).with_name("module.pt"), weights_only=False)
first = {name: value.clone() for name, value in module.state_dict().items()}
quiet = Logger()
quiet.info = lambda *arguments: None
trainer = SGDSerialClientTrainer(module, num_clients=len(order), logger=quiet)
trainer.setup_dataset(Clients())
trainer.setup_optim(epochs=1, batch_size=order.shape[2], lr=float(work["lr"]))
protocol.serve(one_round, "fedlab", "torch")
