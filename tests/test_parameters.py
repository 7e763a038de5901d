"""Splitting parameters by pattern, keyed initial weights, starting from a file."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.models.logreg import logreg
from fedsim.models.mlp import mlp
from fedsim.models.parameters import initialise, load_init, persistent_buffers, split_parameters, tied_names

FC, HEAD = ("body.fc1.weight", "body.fc1.bias"), ("head.weight", "head.bias")


def model(num_classes=4):
    return initialise(lambda: mlp((3,), num_classes, hidden=[5]), seed=0)


class Tied(nn.Module):
    """A language model whose output weight is its embedding's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight


def test_everything_is_shared_by_default():
    parts = split_parameters(model())
    assert parts.shared == Layout((*FC, *HEAD), ((5, 3), (5,), (4, 5), (4,)))
    assert parts.local.names == parts.frozen == parts.buffers.names == ()


@pytest.mark.parametrize(
    ("trainable", "local", "shared", "own", "frozen"),
    [
        (None, r"^head\.", FC, HEAD, ()),
        (r"^head\.", None, HEAD, (), FC),
        ("bias", "head", ("body.fc1.bias",), ("head.bias",), ("body.fc1.weight", "head.weight")),
        ([r"fc1\.w", r"head\.b"], None, ("body.fc1.weight", "head.bias"), (), ("body.fc1.bias", "head.weight")),
        (".", ["weight"], ("body.fc1.bias", "head.bias"), ("body.fc1.weight", "head.weight"), ()),
    ],
)
def test_patterns_split_in_the_models_order(trainable, local, shared, own, frozen):
    parts = split_parameters(model(), trainable=trainable, local=local)
    assert (parts.shared.names, parts.local.names, parts.frozen) == (shared, own, frozen)


def test_without_a_pattern_requires_grad_decides():
    module = model()
    module.body.requires_grad_(False)
    assert split_parameters(module).frozen == FC
    assert split_parameters(module, trainable=".").frozen == ()


def test_tied_parameters_are_one_and_match_by_either_name():
    assert tied_names(Tied()) == {"embed.weight": ("embed.weight", "head.weight"), "head.bias": ("head.bias",)}
    parts = split_parameters(Tied())
    assert parts.shared.names == ("embed.weight", "head.bias")
    assert parts.shared.size == 6 * 4 + 6
    assert split_parameters(Tied(), trainable=r"head\.w").shared.names == ("embed.weight",)
    assert split_parameters(Tied(), local=r"head\.w").local.names == ("embed.weight",)


def test_buffers_are_the_persistent_ones():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module.register_buffer("scratch", torch.zeros(7), persistent=False)
    expected = Layout(("1.running_mean", "1.running_var", "1.num_batches_tracked"), ((3,), (3,), ()))
    assert split_parameters(module).buffers == expected
    assert persistent_buffers(module)["1.running_var"] is module[1].running_var


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"local": r"^haed\."}, ["model.local=", "^haed", "matches no parameter", "head.weight"]),
        ({"trainable": ["head", "body.fc2"]}, ["model.trainable='body.fc2'", "body.fc1.weight"]),
        ({"trainable": "(head"}, ["model.trainable='(head'", "regular expression"]),
        ({"trainable": "head", "local": "body"}, ["model.local='body'", "frozen"]),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_named(patterns, words):
    with pytest.raises(UserError) as caught:
        split_parameters(model(), **patterns)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_client_may_keep_every_parameter():
    parts = split_parameters(model(), local=".")
    assert parts.shared.size == 0
    assert len(parts.local.names) == 4


def test_a_model_with_nothing_to_train_is_refused():
    frozen = model()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter is left to train: 4 of 4 are frozen"):
        split_parameters(frozen)


def test_weights_are_a_function_of_the_seed_alone():
    first = initialise(lambda: mlp((3,), 4), seed=3).state_dict()
    torch.rand(7)  # what ran before
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        again = initialise(lambda: mlp((3,), 4), seed=3).state_dict()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(default)
    with torch.device("meta"):
        third = initialise(lambda: mlp((3,), 4), seed=3).state_dict()
    other = initialise(lambda: mlp((3,), 4), seed=4).state_dict()
    for name, value in first.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again[name])
        assert torch.equal(value, third[name])
        assert not torch.equal(value, other[name])


def test_float64_weights_are_float32_ones_cast_up():
    single, double = model(), model().double()
    for p, q in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(p.double(), q)


def test_the_global_generator_is_put_back_even_after_an_error():
    state = torch.get_rng_state()

    def broken():
        torch.rand(3)
        raise ZeroDivisionError

    initialise(lambda: mlp((3,), 4), seed=3)
    with pytest.raises(ZeroDivisionError):
        initialise(broken, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_a_factory_must_return_a_module():
    with pytest.raises(UserError, match=r"nn\.Module, got int"):
        initialise(lambda: 3, seed=0)


def stored(tmp_path, tensors):
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_model_loads_back(tmp_path, dtype):
    source, target = model(), initialise(lambda: mlp((3,), 4, hidden=[5]), seed=9).to(dtype)
    load_init(target, stored(tmp_path, source.state_dict()))
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        assert q.dtype == dtype
        assert torch.equal(p.to(dtype), q)


def test_buffers_load_with_the_parameters(tmp_path):
    source, target = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    source(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    load_init(target, stored(tmp_path, source.state_dict()))
    assert torch.equal(source[1].running_mean, target[1].running_mean)
    assert target[1].num_batches_tracked == 1


def test_a_backbone_keeps_the_models_own_head(tmp_path):
    source, target = model(), initialise(lambda: mlp((3,), 7, hidden=[5]), seed=9)
    head = target.head.weight.detach().clone()
    load_init(target, stored(tmp_path, {n: t for n, t in source.state_dict().items() if not n.startswith("head.")}))
    assert torch.equal(target.body.fc1.weight, source.body.fc1.weight)
    assert torch.equal(target.head.weight, head)


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_tied_parameter_loads_by_any_of_its_names(tmp_path, kept):
    source, target = Tied(), Tied()
    load_init(target, stored(tmp_path, {kept: source.embed.weight, "head.bias": source.head.bias}))
    assert torch.equal(target.head.weight, source.embed.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t | {"head.weight": torch.zeros(9, 5), "head.bias": torch.zeros(9)},
            ["(9, 5)", "(4, 5)", "new head"],
        ),
        (lambda t: t | {"body.fc1.weight": torch.zeros(5, 2)}, ["body.fc1.weight", "(5, 2)", "(5, 3)"]),
        (lambda t: {n: v for n, v in t.items() if n != "body.fc1.bias"}, ["another model", "lacks body.fc1.bias"]),
        (lambda t: {n: v for n, v in t.items() if n != "head.bias"}, ["another model", "lacks head.bias"]),
        (lambda t: t | {"extra": torch.zeros(1)}, ["another model", "has also extra"]),
    ],
)
def test_a_file_of_another_model_is_refused_and_changes_nothing(tmp_path, change, words):
    target = model()
    before = {n: t.clone() for n, t in target.state_dict().items()}
    other = {n: t + 1 for n, t in before.items()}
    with pytest.raises(UserError) as caught:
        load_init(target, stored(tmp_path, change(other)))
    assert all(word in str(caught.value) for word in [*words, "w.safetensors"]), caught.value
    assert all(torch.equal(t, before[n]) for n, t in target.state_dict().items())


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors: no such file"):
        load_init(logreg((2,), 2), tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(UserError, match=r"text is not a \.safetensors file"):
        load_init(logreg((2,), 2), tmp_path / "text")
