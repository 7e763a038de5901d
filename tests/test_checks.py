"""`check_client` and `check_strategy`: methods that are right pass, and each law finds what breaks it."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedsim.checks import RUN_LAWS
from fedsim.contracts import LinearRule
from fedsim.testing import build_rule, check_client, check_strategy


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Cross-entropy, from which the broken ones below differ in one thing."""

    def criterion(self, logits, targets, weights):
        classes = logits.movedim(-1, 1) if logits.dim() > 2 else logits
        return (weights * cross_entropy(classes, targets, reduction="none")).sum(-1)


class Random(Plain):
    def criterion(self, logits, targets, weights):
        return super().criterion(logits * (1 + torch.rand(())), targets, weights)


class Branching(Plain):
    def criterion(self, logits, targets, weights):
        loss = super().criterion(logits, targets, weights)
        return loss if targets.double().mean().item() > 1 else 2 * loss  # one answer for all that are trained at once


class Asking(Plain):
    """Asks for a tensor's value, to no end."""

    def criterion(self, logits, targets, weights):
        loss = super().criterion(logits, targets, weights)
        return loss if loss.sum().item() > -1 else loss + 1


class Averaging(Plain):
    """Averages over whatever stands in front, which is the batch alone only where one client trains."""

    def criterion(self, logits, targets, weights):
        return cross_entropy(logits.movedim(-1, 1) if logits.dim() > 2 else logits, targets)


class Counting(Plain):
    """Keeps something in itself between calls."""

    calls = 0

    def criterion(self, logits, targets, weights):
        type(self).calls += 1
        return super().criterion(logits, targets, weights) * (1 + self.calls / 100)


class Eps(Plain):
    def criterion(self, logits, targets, weights):
        return super().criterion(logits + 1e7 * torch.finfo(logits.dtype).eps * logits.detach(), targets, weights)


class Nan(Plain):
    def criterion(self, logits, targets, weights):
        return super().criterion(logits, targets, weights) * (logits.detach() * 0).log().sum(-1).sum(-1)


class Writing(Plain):
    """Writes into what the rule sends."""

    def direction(self, grads, params, context):
        context.broadcast["anchor"].add_(1)
        return grads, {}


class Sending(LinearRule):
    """FedAvg that sends something along."""

    def __init__(self, what):
        self.what = what

    def broadcast(self, state):
        return {"anchor": self.what}

    def finish(self, mean, sums, state):
        return mean, state, {}


BROKEN = {
    "repeat": (Random(), None, "draw randomness from context.rng or cohort.rng alone"),
    "engines": (Branching(), None, "differ|a tensor's value is asked for"),
    "alone": (Counting(), None, "keep nothing in the objective between calls"),
    "pure": (Writing(), Sending(torch.zeros(3, dtype=torch.float64)), r"writes into context.broadcast\['anchor'\]"),
    "precision": (Eps(), None, "float32 and float64 differ"),
    "checkpoint": (Counting(), None, "what `finish` returns, not into attributes"),
    "finite": (Nan(), None, "guard the logarithm"),
    "flower": (Plain(), Sending("by name"), "tensors and numbers by name"),
}


@pytest.mark.parametrize("law", BROKEN)
def test_every_law_finds_what_breaks_it(law):
    client, strategy, cure = BROKEN[law]
    with pytest.raises(AssertionError, match=f"law '{law}': .*{cure}"):
        check_client(client, strategy=strategy, laws=[law])


def test_a_cohort_is_one_program_in_every_way_that_a_gpu_may_train_it():
    with pytest.raises(AssertionError, match=r"law 'engines': .*keep leading axes apart"):
        check_client(Averaging(), laws=["engines"])  # recorded steps, a CPU's way, train clients one by one
    with pytest.raises(AssertionError, match="law 'engines': a cohort cannot be trained as one program"):
        check_client(Asking(), laws=["engines"])  # the kernels of layers would run it


def test_what_is_right_passes():
    check_client(Plain())


def test_a_strategy_is_checked_with_its_client():
    check_strategy("scaffold", laws=["streaming", "engines", "checkpoint", "flower"])
    check_strategy(build_rule("krum"), laws=["permutation", "checkpoint"])
    with pytest.raises(AssertionError, match="law 'flower'"):
        check_strategy(Sending("by name"), laws=["flower"])


def test_every_law_of_runs_is_broken_somewhere():
    assert set(RUN_LAWS) - {"device"} == set(BROKEN)
    with pytest.raises(ValueError, match="did you mean 'engines'"):
        check_client(Plain(), laws=["engine"])
    with pytest.raises(ValueError, match="did you mean 'flower'"):
        check_strategy(build_rule("fedavg"), laws=["flowers"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_law():
    check_strategy("scaffold", laws=["device"])
