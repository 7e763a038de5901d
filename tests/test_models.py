"""Built-in models: sizes against counts by hand, one batch axis, batching over clients, the GRU's oracle."""

import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import fedsim.configs
from fedsim.models.char_gru import GRU, char_gru
from fedsim.models.classifier import Classifier
from fedsim.models.cnn import cnn
from fedsim.models.lenet import lenet
from fedsim.models.logreg import logreg
from fedsim.models.mlp import mlp
from fedsim.models.parameters import initialise
from fedsim.models.resnet import Block, resnet8, resnet18

DIGIT, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)


def small(name):
    """One small instance of each model and its input shape; vocabulary and classes 10."""
    shape = {"lenet": (1, 12, 12), "char_gru": (7,)}.get(name, DIGIT)
    factory = {
        "logreg": logreg,
        "mlp": lambda s, c: mlp(s, c, hidden=[6, 5]),
        "cnn": lambda s, c: cnn(s, c, channels=[3, 4], hidden=7),
        "lenet": lenet,
        "resnet8": resnet8,
        "resnet18": resnet18,
        "char_gru": lambda s, c: char_gru(s, c, embedding=3, hidden=5, num_layers=2),
    }[name]
    return initialise(lambda: factory(shape, 10), seed=1), shape


def samples(shape, *lead, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if len(shape) == 1 and shape[0] == 7:
        return torch.randint(0, 10, (*lead, *shape), generator=draw)
    return torch.randn(*lead, *shape, generator=draw)


NAMES = ["logreg", "mlp", "cnn", "lenet", "resnet8", "resnet18", "char_gru"]


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


# Counts by hand. resnet18: published for the BatchNorm variant, whose affine parameters are as many.
# 2NN of McMahan et al.: 199,210. EMNIST CNN of Reddi et al.: 1,206,590. LeNet-5: 61,706 and 62,006.
CONV = 3 * 32 * 9 + 32 + 32 * 64 * 9 + 64
RESNET8 = (
    (3 * 16 * 9 + 32)
    + (2 * 16 * 16 * 9 + 4 * 16)
    + (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32 + 6 * 32)
    + (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64 + 6 * 64)
    + 650
)
GRU_COUNT = 90 * 8 + 3 * 128 * (8 + 128 + 2) + 129 * 90


@pytest.mark.parametrize(
    ("factory", "shape", "num_classes", "count"),
    [
        (logreg, MNIST, 10, 7_850),
        (mlp, (64,), 10, 65 * 200 + 201 * 10),
        (mlp, MNIST, 10, 785 * 200 + 201 * 10),
        (lambda s, c: mlp(s, c, hidden=[200, 200]), MNIST, 10, 199_210),
        (cnn, CIFAR, 10, CONV + (14 * 14 * 64 + 1) * 128 + 129 * 10),
        (cnn, CIFAR, 10, 1_626_442),
        (cnn, MNIST, 62, 1_206_590),
        (lenet, MNIST, 10, 61_706),
        (lenet, CIFAR, 10, 62_006),
        (resnet8, CIFAR, 10, RESNET8),
        (resnet18, CIFAR, 10, 11_173_962),
        (char_gru, (80,), 90, GRU_COUNT),
    ],
)
def test_number_of_parameters(factory, shape, num_classes, count):
    assert num_parameters(factory(shape, num_classes)) == count


def test_dropout_rates_change_no_parameter_name():
    plain, dropped = cnn(MNIST, 10), cnn(MNIST, 10, dropout=[0.25, 0.5])
    assert list(plain.state_dict()) == list(dropped.state_dict())
    assert len(dropped.body) == len(plain.body) + 2


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_head_of_the_features(name):
    model, shape = small(name)
    x = samples(shape, 3)
    logits = model(x)
    assert logits.shape == (3, 10)
    assert isinstance(model, Classifier)
    assert isinstance(model.head, nn.Linear)
    assert torch.equal(logits, model.head(model.features(x)))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    model, shape = small(name)
    model, x = model.double(), samples(shape, 4)
    x = x.double() if x.is_floating_point() else x
    alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    # float64; 1e-12 for kernels that block differently by batch size
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x.flip(0)), alone.flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "resnet18"])  # resnet8's blocks, only larger
def test_clients_batch_under_vmap_as_in_a_loop(name):
    shape = small(name)[1]
    models = [small(name)[0].double() for _ in range(3)]
    for k, model in enumerate(models):
        for parameter in model.parameters():
            parameter.data += 0.01 * k * torch.sin(torch.arange(parameter.numel()).double()).view_as(parameter)
    x = torch.stack([samples(shape, 2, seed=k) for k in range(3)])  # (K, B, …)
    x = x.double() if x.is_floating_point() else x

    def loss(params, x):
        return functional_call(models[0], params, (x,)).logsumexp(-1).sum()

    params, _ = stack_module_state(models)
    batched = vmap(grad(loss))({n: p.detach() for n, p in params.items()}, x)
    for k, model in enumerate(models):
        model.zero_grad()
        model(x[k]).logsumexp(-1).sum().backward()
        for name_, parameter in model.named_parameters():
            # float64; grouped convolutions sum in another order
            torch.testing.assert_close(batched[name_][k], parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_lives_in_a_layer_that_engines_know(name):
    known = (nn.Linear, nn.Conv2d, nn.Embedding, nn.GroupNorm)
    model, _ = small(name)
    in_layers = {
        f"{m}.{p}" for m, module in model.named_modules() if isinstance(module, known) for p in module._parameters
    }
    owned = {n for n, _ in model.named_parameters()}
    assert owned <= in_layers
    assert not list(model.buffers())


def test_gru_equals_torchs():
    ours, torchs = GRU(4, 6).double(), nn.GRU(4, 6, batch_first=True).double()
    with torch.no_grad():
        for layer, suffix in ((ours.input, "ih_l0"), (ours.hidden, "hh_l0")):
            getattr(torchs, f"weight_{suffix}").copy_(layer.weight)
            getattr(torchs, f"bias_{suffix}").copy_(layer.bias)
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    states, expected = ours(x), torchs(x)[0]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-14)  # float64, same products
    (ours_x,) = torch.autograd.grad(states.square().sum(), x)
    (torchs_x,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours_x, torchs_x, rtol=0, atol=1e-13)


def test_gru_starts_as_torchs():
    gru = GRU(3, 16)
    for parameter in gru.parameters():
        assert parameter.abs().max() <= 1 / math.sqrt(16)
        assert parameter.abs().max() > 0.8 / math.sqrt(16)  # not the narrower bound of some other fan-in


def test_char_gru_reads_every_token_and_their_order():
    model, shape = small("char_gru")
    x = samples(shape, 1)
    assert not torch.equal(model(x), model(x.flip(1)))
    for position in range(7):
        changed = x.clone()
        changed[0, position] = (x[0, position] + 1) % 10
        assert not torch.equal(model(x), model(changed))


def test_vocabulary_may_differ_from_the_classes():
    model = char_gru((4,), 2, vocabulary=50)
    assert model(torch.full((1, 4), 49)).shape == (1, 2)


def test_a_block_is_its_formula_and_halves_the_image():
    block = Block(4, 6, stride=2, num_groups=2).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = nn.functional
    h = f.conv2d(x, block.conv1.weight, stride=2, padding=1)
    h = f.relu(f.group_norm(h, 2, block.norm1.weight, block.norm1.bias))
    h = f.group_norm(f.conv2d(h, block.conv2.weight, padding=1), 2, block.norm2.weight, block.norm2.bias)
    skip = f.conv2d(x, block.shortcut[0].weight, stride=2)
    expected = f.relu(h + f.group_norm(skip, 2, block.shortcut[1].weight, block.shortcut[1].bias))
    assert block(x).shape == (2, 6, 3, 3)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-13)  # float64, same kernels
    assert len(Block(4, 4, stride=1, num_groups=2).shortcut) == 0


def test_gradients_of_the_convolutional_model():
    model = small("cnn")[0].double()
    x = torch.randn(2, *DIGIT, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x).logsumexp(-1), (x,))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: cnn((64,), 10), ["cnn", "input_shape=(64,)", "model=mlp"]),
        (lambda: cnn((1, 5, 8), 10), ["cnn", ">= 6", "5x8"]),
        (lambda: cnn(MNIST, 10, channels=[1, 2, 3]), ["two channels", "[1, 2, 3]"]),
        (lambda: cnn(MNIST, 10, channels=[1, 0]), ["channels[1]", ">= 1", "got 0"]),
        (lambda: cnn(MNIST, 10, dropout=[0.0, 1.0]), ["0 <= p < 1", "1.0"]),
        (lambda: lenet(DIGIT, 10), ["lenet", ">= 12", "8x8"]),
        (lambda: resnet8(MNIST, 10, num_groups=3), ["num_groups", "16", "got 3"]),
        (lambda: resnet18(MNIST, 10, num_groups=0), ["num_groups", "got 0"]),
        (lambda: resnet18((3, 4, 4), 10), ["resnet18", ">= 8", "4x4"]),
        (lambda: mlp((4,), 10, hidden=[3, 0]), ["hidden[1]", "got 0"]),
        (lambda: logreg((4,), 1), ["num_classes", ">= 2", "got 1"]),
        (lambda: char_gru((1, 28, 28), 10), ["char_gru", "tokens"]),
        (lambda: char_gru((5,), 10, hidden=0), ["hidden", "got 0"]),
    ],
)
def test_wrong_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        build()
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 13, 15), (3, 31, 40), (3, 32, 32), (2, 33, 47)])
def test_odd_images_fit_the_dense_layers(shape):
    x = torch.zeros(1, *shape)
    assert lenet(shape, 3)(x).shape == cnn(shape, 3, hidden=2)(x).shape == resnet8(shape, 3)(x).shape == (1, 3)


CONFIGS = Path(next(iter(fedsim.configs.__path__)))


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_each_config_lists_its_targets_arguments_and_defaults(path):
    assert path.read_text().startswith("# ")
    with initialize_config_module("fedsim.configs", version_base="1.3"):
        config = OmegaConf.to_object(compose(f"model/{path.stem}")["model"])
    assert {n: config.pop(n, "absent") for n in ("seed", "init", "trainable", "local")} == dict.fromkeys(
        ("seed", "init", "trainable", "local")
    )
    module, _, function = config.pop("_target_").rpartition(".")
    arguments = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    defaults = {
        n: list(p.default) if isinstance(p.default, tuple) else p.default
        for n, p in arguments.items()
        if n not in ("input_shape", "num_classes")
    }
    if path.stem == "mlp_bn":  # the mlp with one argument turned on
        assert config.pop("batch_norm") is not defaults.pop("batch_norm")
    assert config == defaults
