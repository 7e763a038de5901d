"""What a round's row and the clients' rows say: one pass over the data, then sums over segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.ascent import Ascent
from fedsim.contracts import Cohort, Dataset, Partition
from fedsim.data.splits import ClientSplits
from fedsim.engine.evaluate import own_parts, predict
from fedsim.engine.task import BUFFER, LOCAL, Task
from fedsim.finetune import FineTuner
from fedsim.local import Int64
from fedsim.metrics.budget import Evaluation
from fedsim.metrics.calibration import expected_calibration_error
from fedsim.metrics.classification import (
    Figures,
    Outputs,
    balanced_accuracy,
    concatenate,
    group_means,
    groups_by_count,
    groups_by_share,
    overall,
    per_class_recall,
    per_client,
)
from fedsim.metrics.decomposition import decompose, subsample
from fedsim.metrics.fairness import accuracy_by_skew_quartile, fairness
from fedsim.metrics.robust import Adversary
from fedsim.metrics.skew import label_counts, label_tv
from fedsim.rng import keyed_bits

Columns = dict[str, Any]


class ClientFigures(NamedTuple):
    """What an evaluation on the clients' own data says."""

    figures: Figures  # for the round's row
    clients: Int64  # (C,) ids of those that have test samples
    columns: dict[str, Tensor]  # name → (C,), for the clients' rows


class Evaluator:
    """Evaluates a model on the server's splits, on the clients' own data, and term by term.

    Args:
        task: model, data and the clients' state.
        dataset: for its splits and classes.
        splits: whose samples are whose.
        settings: what is measured.
        byzantine: (num_clients,) bool, who attacks; None: nobody.

    """

    def __init__(
        self, task: Task, dataset: Dataset, splits: ClientSplits, settings: Evaluation, *,
        byzantine: np.ndarray[Any, np.dtype[np.bool_]] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.splits, self.settings = task, splits, settings
        self.num_classes = dataset.num_classes
        self.server = {
            name: self._put(positions)
            for name, positions in dataset.splits.items()
            if name != "train" and len(positions)
        }
        self.test = self._put(splits.test.indices)
        labels = dataset.y.numpy()
        counts = label_counts(labels, splits.train, dataset.num_classes)  # (K, C)
        class_counts = torch.from_numpy(counts.sum(0)).to(task.device)  # (C,)
        self.groups = groups_by_count(class_counts) | groups_by_share(class_counts)
        # A held-out client trains on nothing: its skew is that of what it is tested on.
        if len(splits.test.indices):
            counts += label_counts(labels, splits.test, dataset.num_classes) * (counts.sum(1, keepdims=True) == 0)
        self.client_skew = torch.from_numpy(label_tv(counts))  # (K,)
        self.held_out = torch.from_numpy(splits.held_out)
        self.tuner = FineTuner(task, splits, settings.finetune_steps) if settings.finetune_steps else None
        ascent = Ascent(
            settings.robust_radius, settings.robust_steps, low=settings.robust_low, high=settings.robust_high
        )
        key = int(keyed_bits(task.seed, "robust") >> np.uint64(40))
        self.adversary = Adversary(ascent, key) if settings.robust_radius else None
        self.honest = None if byzantine is None else torch.from_numpy(~byzantine)  # (K,)
        self.pool = self._put(
            subsample(splits.train.indices, settings.decomposition_samples, task.seed)
            if settings.decomposition_every
            else np.zeros(0, dtype=np.int64)
        )

    def _put(self, positions: Int64, round: int | None = None) -> Tensor:
        """Return positions on the device: where samples lie in a round, or always."""
        if round is not None and self.task.shift is not None:
            positions = self.task.shift(positions, round)
        return torch.from_numpy(np.ascontiguousarray(positions)).to(self.task.device)

    def _in(self, positions: Tensor, round: int) -> Tensor:
        """Return where samples (n,) lie in a round."""
        return positions if self.task.shift is None else self._put(positions.cpu().numpy(), round)

    @property
    def personal(self) -> bool:
        """Whether a client's model differs from the server's: in parameters or in running statistics."""
        return any(name.startswith((LOCAL, BUFFER)) for name in self.task.store.first)

    def global_figures(self, weights: Tensor, buffers: Tensor, round: int) -> Figures:
        """Evaluate the global model after a round on the test and validation splits, as they are in that round.

        Where models have personal parameters there is no global model: each client's is evaluated on its own
        test samples, and `accuracy` and `loss` are means over the samples of the clients that train and do not attack;
        what a split that an attack added says is a mean over its samples, each dealt to one of these clients' models.
        """
        if self.personal:
            tested = self._good(np.flatnonzero(~self.splits.held_out & (self.splits.test.sizes > 0)))
            result, labels = self._personal(weights, buffers, self.splits.test, tested, round)
            figures = self._figures(result, labels)
            for name in self.server.keys() - {"test", "validation"}:
                dealt = _dealt(self.server[name].cpu().numpy(), tested, len(self.held_out))
                result, _ = self._personal(weights, buffers, dealt, np.flatnonzero(dealt.sizes), round)
                figures |= {f"{name}_{key}": value for key, value in overall(result).items()}
            if self.adversary is not None:
                figures |= _robust(self._personal(weights, buffers, self.splits.test, tested, round, self.adversary)[0])
            return figures
        figures = {}
        for name, always in self.server.items():
            positions = self._in(always, round)
            result = predict(self.task, weights, positions, buffers=buffers)
            mine = self._figures(result, self.task.y[positions]) if name == "test" else overall(result)
            if self.adversary is not None:
                moved = predict(self.task, weights, positions, buffers=buffers, adversary=self.adversary)
                mine |= _robust(moved)
            figures.update(mine if name == "test" else {f"{name}_{key}": value for key, value in mine.items()})
        return figures

    def _good(self, clients: Int64) -> Int64:
        """Return those of clients (n,) that do not attack; all, where nobody else is there."""
        honest = clients if self.honest is None else clients[self.honest.numpy()[clients]]
        return honest if len(honest) else clients

    def _figures(self, result: Outputs, labels: Tensor) -> Figures:
        figures = overall(result)
        if self.settings.calibration:
            figures["ece"] = expected_calibration_error(result, self.settings.calibration_bins)
        if self.settings.per_class:
            recall = per_class_recall(result, labels, self.num_classes)  # (C,)
            figures["balanced_accuracy"] = balanced_accuracy(recall)
            figures |= group_means(recall, self.groups)
            figures |= {f"recall_{k}": value for k, value in enumerate(recall.unbind())}
        return figures

    def _personal(
        self, weights: Tensor, buffers: Tensor, data: Partition, clients: Int64, round: int,
        adversary: Adversary | None = None,
    ) -> tuple[Outputs, Tensor]:  # fmt: skip
        """Evaluate each client's own model on its own samples, client by client; return (outputs, labels)."""
        parts, labels = [], []
        for client in clients.tolist():
            local, mine = own_parts(self.task, client, weights, buffers)
            positions = self._put(data.of(client), round)
            parts.append(predict(self.task, weights, positions, buffers=mine, local=local, adversary=adversary))
            labels.append(self.task.y[positions])
        return concatenate(parts), torch.cat(labels)

    def client_figures(self, weights: Tensor, buffers: Tensor, round: int) -> ClientFigures | None:
        """Evaluate on each client's own test samples; None where no client has any."""
        data = self.splits.test
        clients = np.flatnonzero(data.sizes > 0)
        if not len(clients):
            return None
        if self.personal:
            result, _ = self._personal(weights, buffers, data, clients, round)
        else:
            result = predict(self.task, weights, self._in(self.test, round), buffers=buffers)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(data.sizes[clients])])).to(self.task.device)
        mine = per_client(result, offsets)
        accuracy, counts = mine["accuracy"].cpu(), mine["num_samples"].cpu()
        out = self.held_out[clients]
        figures: Figures = {}
        groups = [("client", ~out), ("held_out", out)]
        if self.honest is not None:
            groups.append(("honest", ~out & self.honest[clients]))
        for prefix, chosen in groups:
            if bool(chosen.any()):
                summary = fairness(accuracy[chosen], counts[chosen])
                if prefix == "client":
                    summary |= accuracy_by_skew_quartile(accuracy[chosen], self.client_skew[clients][chosen])
                figures |= {f"{prefix}_{name}": value for name, value in summary.items()}
        columns = {"test_accuracy": accuracy, "test_loss": mine["loss"].cpu(), "num_test_samples": counts}
        if self.tuner is not None:
            tuned = self._tuned(self.tuner, weights, buffers, round)
            figures |= tuned.figures
            everyone = accuracy.new_full((len(self.held_out),), torch.nan)  # (K,)
            everyone[tuned.clients] = tuned.columns["finetuned_accuracy"].to(everyone)
            columns["finetuned_accuracy"] = everyone[clients]
        return ClientFigures(figures, clients, columns)

    def _tuned(self, tuner: FineTuner, weights: Tensor, buffers: Tensor, round: int) -> ClientFigures:
        """Test each client's model after some local steps."""
        accuracy, counts = tuner.accuracies(weights, buffers, round)
        out = self.held_out[tuner.clients]
        figures: Figures = {}
        groups = [("client", ~out), ("held_out", out)]
        if self.honest is not None:
            groups.append(("honest", ~out & self.honest[tuner.clients]))
        for prefix, chosen in groups:
            if bool(chosen.any()):
                summary = fairness(accuracy[chosen], counts[chosen])
                figures |= {f"{prefix}_finetuned_{name}": value for name, value in summary.items()}
        return ClientFigures(figures, tuner.clients, {"finetuned_accuracy": accuracy})

    def decomposition(
        self, weights: Tensor, buffers: Tensor, cohort: Cohort, round: int, older: Mapping[int, Tensor]
    ) -> Figures:
        """Split the new model's global loss into local loss, distribution shift and aggregation.

        Args:
            weights: (D,) after a round.
            buffers: likewise.
            cohort: of the round, with its rows.
            round: whose samples are seen.
            older: version → its buffers, with which a stale client's model is seen; of others they are `buffers`.

        """
        rows, pool = cohort.rows, self._in(self.pool, round)
        local, everywhere = [], []
        for k, client in enumerate(cohort.clients.tolist()):
            w = cohort.models[int(cohort.received[k])] + rows[k].to(weights.device)  # (D,)
            mine = self._put(self.task.partition.of(client), round)
            own = older.get(int(cohort.received[k]), buffers)
            local.append(predict(self.task, w, mine, buffers=own).loss.double().mean())
            everywhere.append(predict(self.task, w, pool, buffers=own).loss.double().mean())
        total = predict(self.task, weights, pool, buffers=buffers).loss.double().mean()
        return decompose(torch.stack(local), torch.stack(everywhere), total, cohort.weights)

    def train_losses(
        self, weights: Tensor, buffers: Tensor, clients: Int64, round: int
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the mean loss (n,) on the training samples of clients (n,) of the model each would start from."""
        data = self.task.partition
        if self.personal:
            result, _ = self._personal(weights, buffers, data, clients, round)
        else:
            positions = np.concatenate([data.of(int(k)) for k in clients])
            result = predict(self.task, weights, self._put(positions, round), buffers=buffers)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(data.sizes[clients])])).to(self.task.device)
        losses: np.ndarray[Any, np.dtype[np.float64]] = per_client(result, offsets)["loss"].cpu().numpy()
        return losses


def _dealt(positions: Int64, clients: Int64, num_clients: int) -> Partition:
    """Deal positions (n,) out to some of all clients, ids ascending, so that numbers differ by at most one."""
    hands = [positions[k :: len(clients)] for k in range(len(clients))]
    sizes = np.zeros(num_clients, dtype=np.int64)  # (K,)
    sizes[clients] = [len(hand) for hand in hands]
    return Partition(np.concatenate(hands), np.concatenate([[0], np.cumsum(sizes)]))


def _robust(result: Outputs) -> Figures:
    return {f"robust_{name}": value for name, value in overall(result).items()}


def with_evaluation(cohort: Cohort, trained: Columns, evaluated: ClientFigures | None) -> tuple[Int64, Columns]:
    """Join what training and evaluation say of clients: (ids ascending, name → one value a client, NaN for none)."""
    ids = cohort.clients.cpu().numpy()
    if evaluated is None:
        return ids, trained
    everyone = np.union1d(ids, evaluated.clients)
    return everyone, _scatter(everyone, ids, trained) | _scatter(everyone, evaluated.clients, evaluated.columns)


def _scatter(everyone: Int64, ids: Int64, columns: Columns) -> Columns:
    where = np.searchsorted(everyone, ids)
    table = {}
    for name, values in columns.items():
        column = np.full(len(everyone), np.nan)
        column[where] = torch.as_tensor(values).double().cpu().numpy()
        table[name] = column
    return table
