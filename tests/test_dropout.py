"""Keyed dropout: its law, and that batching, padding, dtype and order of clients change no mask."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from fedsim.errors import UserError
from fedsim.models.cnn import cnn
from fedsim.models.dropout import KeyedDropout, dropout_key, replace_dropout
from fedsim.rng import fold_in, uniform_like


def key(value):
    return torch.tensor(value, dtype=torch.int64)


def apply(module, x, value):
    with dropout_key(key(value)):
        return module(x)


def test_mask_is_the_stated_function_of_key_call_and_position():
    x = torch.full((3, 4), 2.0)
    uniform = uniform_like(x, fold_in(key(5), 0))  # (3, 4)
    expected = torch.where(uniform >= 0.25, x / 0.75, torch.zeros(()))
    assert torch.equal(apply(KeyedDropout(0.25), x, 5), expected)


def lowbias32(x):
    """The hash in Python's integers: constants 7feb352d and 846ca68b, shifts 16, 15, 16, all modulo 2^32."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("value", [0, 5, 2**31 - 1, 2**31, 2**32 - 1, 2**40 + 3])
def test_uniforms_are_the_stated_hash_in_any_precision(value):
    expected = [(lowbias32(lowbias32(i) ^ value % 2**32) >> 8) / 2**24 for i in range(600)]
    for dtype in (torch.float32, torch.float64):
        assert uniform_like(torch.empty(20, 30, dtype=dtype), key(value)).flatten().tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_units_are_dropped_at_rate_p_and_the_mean_is_kept(p):
    y = apply(KeyedDropout(p), torch.ones(400, 1000, dtype=torch.float64), 11)
    dropped = (y == 0).double()
    sigma = np.sqrt(p * (1 - p) / dropped.numel())
    assert abs(dropped.mean() - p) < 4 * sigma
    assert abs(y.mean() - 1) < 4 * sigma / (1 - p)
    assert np.allclose(y[y != 0], 1 / (1 - p), rtol=1e-15)
    # Rows and columns are not alike: each one's rate is p within 5 of its own sigmas.
    for axis, length in ((0, 400), (1, 1000)):
        assert (dropped.mean(axis) - p).abs().max() < 5 * np.sqrt(p * (1 - p) / length)


def test_keys_layers_and_samples_have_unrelated_masks():
    x = torch.ones(2, 20_000)
    model = nn.Sequential(KeyedDropout(0.5), nn.Threshold(0.0, 0.0))
    kept = {k: (apply(model, x, k) > 0).double() - 0.5 for k in (1, 2, 3)}
    shared = KeyedDropout(0.5)
    with dropout_key(key(1)):
        first, second = (shared(x) > 0).double() - 0.5, (shared(x) > 0).double() - 0.5
    assert torch.equal(first, kept[1])  # the first call of the forward
    bound = 4 / np.sqrt(20_000)  # of a correlation of independent signs
    for a, b in (
        (kept[1][0], kept[2][0]),
        (kept[2][0], kept[3][0]),
        (first[0], second[0]),  # one module used twice
        (kept[1][0], kept[1][1]),  # two samples
        (kept[1][0, 1:], kept[1][0, :-1]),  # neighbours
    ):
        assert abs(float((a * b).mean() * 4)) < bound


def test_padding_a_batch_changes_no_mask():
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    padded = torch.cat([x, torch.ones(2, 3, 4, 4)])
    for module in (KeyedDropout(0.4), KeyedDropout(0.4, channelwise=True)):
        assert torch.equal(apply(module, padded, 3)[:5], apply(module, x, 3))


@pytest.mark.parametrize("channelwise", [False, True])
def test_vmapped_and_merged_clients_equal_the_loop(channelwise):
    module = KeyedDropout(0.5, channelwise=channelwise)
    x = torch.rand(4, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0))  # (R, B, …)
    keys = torch.tensor([9, 8, 1 << 31, 6])
    loop = torch.stack([apply(module, x[r], int(keys[r])) for r in range(4)])

    def forward(x, key):
        with dropout_key(key):
            return module(x)

    assert torch.equal(vmap(forward)(x, keys), loop)
    assert torch.equal(vmap(forward, chunk_size=3)(x, keys), loop)
    with dropout_key(keys):
        assert torch.equal(module(x.flatten(0, 1)).view_as(x), loop)


def test_a_model_trains_alike_alone_and_batched():
    models = [cnn((1, 8, 8), 3, channels=[2, 3], hidden=4, dropout=[0.25, 0.5]).double() for _ in range(3)]
    x = torch.rand(3, 2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([3, 1, 2])

    def forward(params, x, key):
        with dropout_key(key):
            return functional_call(models[0], params, (x,))

    batched = vmap(forward)(stack_module_state(models)[0], x, keys)
    for k, model in enumerate(models):
        # float64; a wrong mask differs in the first digit
        torch.testing.assert_close(batched[k], apply(model, x[k], int(keys[k])), rtol=0, atol=1e-12)
    assert not torch.allclose(apply(models[0], x[0], 3), apply(models[0], x[0], 4))


def test_mask_does_not_depend_on_the_dtype():
    x = torch.ones(8, 20_000)  # enough that some uniforms lie where bfloat16 would round across p
    masks = [apply(KeyedDropout(0.3), x.to(dtype), 2) != 0 for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert apply(KeyedDropout(0.3), x.bfloat16(), 2).dtype == torch.bfloat16


def test_channelwise_drops_whole_channels():
    y = apply(KeyedDropout(0.5, channelwise=True), torch.ones(16, 8, 3, 3), 1)
    means = y.mean((2, 3))  # (16, 8)
    assert set(means.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(means[0], means[1])


def test_gradients_flow_through_kept_units_only():
    x = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    module = KeyedDropout(0.5)
    assert torch.autograd.gradcheck(lambda x: apply(module, x, 4), (x,))


def test_identity_in_eval_mode_and_at_rate_zero():
    x = torch.rand(3, 5)
    assert KeyedDropout(0.5).eval()(x) is x
    assert KeyedDropout(0.0)(x) is x


def test_needs_a_key_in_training():
    with pytest.raises(RuntimeError, match="dropout_key"):
        KeyedDropout(0.5)(torch.ones(1, 2))
    with dropout_key(key(1)):
        pass
    with pytest.raises(RuntimeError, match="dropout_key"):  # the context leaves nothing behind
        KeyedDropout(0.5)(torch.ones(1, 2))


def test_no_global_randomness_is_touched():
    state = torch.get_rng_state()
    apply(KeyedDropout(0.5), torch.ones(4, 4), 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_rate_is_checked(p):
    with pytest.raises(ValueError, match="0 <= p < 1"):
        KeyedDropout(p)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2), nn.Sequential(nn.Dropout2d(0.3)))
        self.last = nn.Dropout(0.4)
        self.again = self.last


def test_replace_reaches_every_dropout_and_nothing_else():
    model = Nested()
    model.last.eval()
    before = list(model.state_dict())
    assert replace_dropout(model) is model
    assert not any(type(m) in (nn.Dropout, nn.Dropout2d) for m in model.modules())
    assert (model.inner[1].p, model.inner[1].channelwise) == (0.2, False)
    assert (model.inner[2][0].p, model.inner[2][0].channelwise) == (0.3, True)
    assert model.last.p == model.again.p == 0.4
    assert not model.last.training
    assert model.inner[1].training
    assert list(model.state_dict()) == before
    assert isinstance(replace_dropout(nn.Dropout(0.1)), KeyedDropout)


@pytest.mark.parametrize(
    "module",
    [nn.AlphaDropout(), nn.GRU(2, 2, num_layers=2, dropout=0.1), nn.TransformerEncoderLayer(4, 1, batch_first=True)],
    ids=lambda module: type(module).__name__,
)
def test_what_cannot_be_keyed_is_refused(module):
    with pytest.raises(UserError, match=r"part.*global generator"):
        replace_dropout(nn.ModuleDict({"part": module}))


def test_what_has_its_dropout_off_is_accepted():
    replace_dropout(nn.TransformerEncoderLayer(4, 1, dropout=0.0, batch_first=True))
    replace_dropout(nn.GRU(2, 2, num_layers=2))
