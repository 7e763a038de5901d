"""Where each tensor stands in a flat vector."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.layout import Layout

SHAPES = st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(shapes=SHAPES, lead=st.sampled_from([(), (4,), (2, 3)]))
def test_join_undoes_split_and_split_gives_views(shapes, lead):
    layout = Layout(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))
    flat = torch.randn(*lead, layout.size, generator=torch.Generator().manual_seed(0))
    params = layout.split(flat)
    for (name, value), shape in zip(params.items(), shapes, strict=True):
        assert value.shape == (*lead, *shape)
        assert torch.equal(value.reshape(*lead, -1), flat[..., layout.slices[name]])
        assert value.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert torch.equal(layout.join(params, lead=len(lead)), flat)


def test_slices_by_hand():
    layout = Layout(("w", "scalar", "b"), ((2, 3), (), (4,)))
    assert layout.sizes == (6, 1, 4)
    assert layout.size == 11
    assert layout.slices == {"w": slice(0, 6), "scalar": slice(6, 7), "b": slice(7, 11)}


def test_layout_of_tensors_keeps_their_order():
    tensors = {"b": torch.zeros(2), "a": torch.zeros(3, 1)}
    assert Layout.of(tensors) == Layout(("b", "a"), ((2,), (3, 1)))
    assert Layout.vector([2, 3]).slices == {"0": slice(0, 2), "1": slice(2, 5)}


def test_join_follows_the_layout_and_not_the_mapping():
    layout = Layout(("a", "b"), ((1,), (2,)))
    joined = layout.join({"b": torch.tensor([2.0, 3.0]), "extra": torch.zeros(9), "a": torch.tensor([1.0])})
    assert joined.tolist() == [1.0, 2.0, 3.0]


def test_a_layout_of_nothing_is_an_empty_vector():
    empty = Layout((), ())
    assert empty.size == 0
    assert empty.join({}).shape == (0,)
    assert empty.split(torch.zeros(5, 0)) == {}


def test_names_without_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape a name, got 2 names, 1 shapes"):
        Layout(("a", "b"), ((1,),))
