"""The data set that is kept between the runs of one process."""

import pytest

from fedsim.data.kept import keeping, kept


def loads(log, name):
    def load():
        log.append(name)
        return object()

    return load


def test_only_equal_settings_and_only_the_last_ones_are_kept():
    log, store = [], {}
    with keeping(store):
        first = kept({"name": "a", "n": 1}, loads(log, "a1"))
        assert kept({"n": 1, "name": "a"}, loads(log, "a1")) is first
        kept({"name": "a", "n": 2}, loads(log, "a2"))
        assert len(store) == 1
        assert kept({"name": "a", "n": 1}, loads(log, "a1 again")) is not first
    assert log == ["a1", "a2", "a1 again"]
    with keeping(store):  # the next run
        kept({"name": "a", "n": 1}, loads(log, "never"))
    assert log[-1] == "a1 again"


def test_nothing_is_kept_otherwise():
    log = []
    assert kept({}, loads(log, "x")) is not kept({}, loads(log, "x"))
    with pytest.raises(ArithmeticError), keeping({}):
        raise ArithmeticError
    kept({}, loads(log, "x"))
    assert log == ["x"] * 3
