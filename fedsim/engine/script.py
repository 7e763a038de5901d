"""The native loop of captured clients, in TorchScript."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch

from fedsim.engine.record import Program


def compiled(programs: Sequence[Program], padded: Sequence[bool], ends: Sequence[Program]) -> Callable[..., None]:
    """Return the native loop over steps of some programs, see `LOOP` for what it takes.

    Args:
        programs: of `Step`.
        padded: whether each reads the weights of its samples.
        ends: of a client's round, for its last step being the first, the second, …; none: nothing is left to do then.

    """
    every = [*programs, *ends]
    texts = [
        _choice("begin", [program.begin for program in every]),
        _choice("step", [program.body for program in every]),
    ]
    unit = torch.jit.CompilationUnit("\n".join([*texts, LOOP]))
    constants = [list(program.constants) for program in every]
    lasts = list(range(len(programs), len(every)))
    deferral = programs[0].deferral
    late = -1 if deferral is None else deferral.weight
    unread = not any(late in program.reads for program in ends)
    others = [list(program.others) for program in every]
    handed = len(programs[0].factors.results)
    crosses = [-1 if program.crossed is None else program.crossed for program in every]
    return lambda *given: unit.loop(*given, list(padded), lasts, late, unread, others, handed, crosses, constants)


def _choice(name: str, bodies: Sequence[str]) -> str:
    """Return a function that runs the body of a number."""
    given = "inputs: List[Tensor], ahead: List[Tensor], all: List[List[Tensor]]"
    each = [
        f"def {name}_{k}({given}) -> List[Tensor]:\n" + textwrap.indent(f"constants = all[{k}]\n{body}\n", "    ")
        for k, body in enumerate(bodies)
    ]
    chosen = [f"    if which == {k}:\n        return {name}_{k}(inputs, ahead, all)" for k in range(1, len(bodies))]
    head = f"def {name}(which: int, {given}) -> List[Tensor]:"
    return "\n".join([*each, head, *chosen, f"    return {name}_0(inputs, ahead, all)"])


LOOP = """
def loop(
    work: List[Tensor], samples: Tensor, weights: Tensor, keys: Tensor, sample_keys: Tensor,
    starts: List[Tensor], common: List[List[Tensor]], corrections: List[List[Tensor]], x: Tensor, y: Tensor,
    flat: Tensor, params: List[Tensor], slots: List[Tensor], apart: List[Tensor], apart_views: List[Tensor],
    local: List[Tensor], kept: List[Tensor], own: List[Tensor], left: List[Tensor],
    out: Optional[Tensor], total: Tensor, shares: List[float], fresh: bool, norms: Tensor, losses: Tensor,
    padded: List[bool], lasts: List[int], late: int, unread: bool, others: List[List[int]], handed: int,
    crosses: List[int], constants: List[List[Tensor]]
):
    # Made lists here, where Python's lock is not held.
    rows: List[int] = work[0].tolist()
    gathers: List[int] = work[1].tolist()
    first: List[int] = work[2].tolist()
    length: List[int] = work[3].tolist()
    program: List[int] = work[4].tolist()
    versions: List[int] = work[5].tolist()
    given: List[Tensor] = []
    s = 0
    low = 0
    most = 0  # samples gathered at once
    for k in range(len(first) - 1):
        count = 0
        for j in range(first[k], first[k + 1]):
            count = count + length[j]
        most = max(most, count)
    gathered, labels = x.index_select(0, samples[:most]), y.index_select(0, samples[:most])
    products, pending, gram = gathered, gathered, gathered
    if late >= 0:
        products = flat.new_empty([most, params[late].size(0)])
        pending = torch.empty_like(products)
        gram = flat.new_empty([most * most])
    size = flat.numel()
    defers = late >= 0 and late < len(params) - len(local) and unread  # a shared one, which no end reads
    for i in range(len(rows)):
        row = rows[i]
        start = starts[versions[i]]
        delta = flat
        if out is not None:
            delta = out[row]
        # A deferred weight that nobody else reads and that is written once need not be in `flat`, from `a` to `b`: the
        # update gets its difference at once.
        once = defers and gathers[i + 1] - gathers[i] == 1
        a, b = size, size
        if once:
            a = params[late].storage_offset()
            b = a + params[late].numel()
            flat.narrow(0, b, size - b).copy_(start.narrow(0, b, size - b))
        flat.narrow(0, 0, a).copy_(start.narrow(0, 0, a))
        for j in range(len(apart)):
            view = apart_views[j]
            apart[j].copy_(start.narrow(0, view.storage_offset(), view.numel()).view_as(view))
        for j in range(len(local)):
            local[j].copy_(kept[j][row])
        for j in range(len(slots)):
            slots[j].zero_()
        told = params + slots + common[versions[i]]
        for j in range(len(own)):
            told.append(own[j][row])
        carried: List[Tensor] = []
        aheads: Dict[int, List[Tensor]] = {}
        begun = s
        for k in range(gathers[i], gathers[i + 1]):
            high = low
            for j in range(first[k], first[k + 1]):
                high = high + length[j]
            count = high - low
            xs = torch.index_select(x, 0, samples[low:high], out=gathered.narrow(0, 0, count))
            ys = torch.index_select(y, 0, samples[low:high], out=labels.narrow(0, 0, count))
            at = 0
            matrix, met = xs, xs
            begins: Dict[int, int] = {}
            firsts: Dict[int, List[Tensor]] = {}
            if late >= 0:
                matrix = xs.flatten(1)
                weight = start.narrow(0, a, b - a).view_as(params[late]) if once else params[late]
                torch.mm(matrix, weight.t(), out=products.narrow(0, 0, count))
                # Of the samples, without those of the first step and without those of the last.
                later, former = count - length[s], count - length[first[k + 1] - 1]
                square = gram.narrow(0, 0, later * former).view([later, former])
                met = torch.mm(matrix.narrow(0, length[s], later), matrix.narrow(0, 0, former).t(), out=square)
            while s < first[k + 1]:
                batch = length[s]
                inputs = told + [xs.narrow(0, at, batch), ys.narrow(0, at, batch)]
                if padded[program[s]]:
                    inputs.append(weights.narrow(0, low, batch))
                if keys.numel() > 0:
                    inputs.append(keys[s])
                if sample_keys.numel() > 0:
                    inputs.append(sample_keys.narrow(0, low, batch))
                if len(corrections) > 0:
                    inputs = inputs + corrections[s - begun]
                inputs = inputs + carried
                which = program[s]
                if which not in aheads:
                    aheads[which] = begin(which, inputs, [], constants)
                if late >= 0:
                    product = products.narrow(0, at, batch)
                    if at > 0:
                        each = met.narrow(0, met.size(0) - count + at, batch).narrow(1, 0, at)
                        product.addmm_(each, pending.narrow(0, 0, at), alpha=-1)
                    inputs.append(product)
                    if len(others[which]) > 0:
                        if which not in firsts:
                            rest = matrix.narrow(0, at, count - at)
                            firsts[which] = [torch.mm(rest, aheads[which][j]) for j in others[which]]
                            begins[which] = at
                        for other in firsts[which]:
                            inputs.append(other.narrow(0, at - begins[which], batch))
                    if crosses[which] >= 0:
                        if at > 0:
                            before = length[s - 1]
                            each = met.narrow(0, met.size(0) - count + at, batch)
                            inputs.append(each.narrow(1, at - before, before))
                        else:
                            left_over = carried[len(carried) - handed + crosses[which]]
                            inputs.append(torch.mm(matrix.narrow(0, 0, batch), left_over.t()))
                results = step(which, inputs, aheads[which], constants)
                if late >= 0:
                    pending.narrow(0, at, batch).copy_(results.pop())
                given.append(results[0])
                carried = results[1:]
                at = at + batch
                low = low + batch
                s = s + 1
            if late >= 0:
                written = delta.narrow(0, a, b - a).view_as(params[late]) if once else params[late]
                written.addmm_(pending.narrow(0, 0, count).t(), matrix, beta=0 if once else 1, alpha=-1)
            if k + 1 < gathers[i + 1]:
                for j in range(len(carried) - handed, len(carried)):
                    carried[j] = carried[j].clone()  # it may be of the samples that the next ones are written over
        if len(lasts) > 0:
            results = step(lasts[min(s - begun, len(lasts)) - 1], told + carried, [], constants)
            for j in range(len(left)):
                left[j][row].copy_(results[j])
        for j in range(len(apart)):
            apart_views[j].copy_(apart[j].clone())
        for j in range(len(local)):
            kept[j][row].copy_(local[j])
        torch.sub(flat.narrow(0, 0, a), start.narrow(0, 0, a), out=delta.narrow(0, 0, a))
        torch.sub(flat.narrow(0, b, size - b), start.narrow(0, b, size - b), out=delta.narrow(0, b, size - b))
        if out is not None:
            norms[row].copy_(torch.linalg.vector_norm(delta).square())
        else:
            norm = torch.dot(flat, flat)
            norms[row].copy_(norm)
            if float(norm.item()) < float("inf"):  # neither is a NaN
                if fresh:
                    torch.mul(flat, shares[row], out=total)
                else:
                    total.add_(flat, alpha=shares[row])
                fresh = False
    if fresh and out is None:
        total.zero_()
    if len(given) > 0:
        losses.copy_(torch.stack(given))
"""
"""Local rounds, client after client: from the version that each starts from, in the memory of one lane, by steps that
were recorded, to its update: a row of `out`, or added to `total` with its share where there is no `out`; a `fresh`
total has no value yet. What else a client leaves goes to its rows of `left`. A weight that steps defer is that of
number `late`; none: −1. The last `handed` of what is carried are factors; `crosses` says which of them is the samples
of the step before, where a program asks for their product with its own; none: −1."""
