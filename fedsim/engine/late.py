"""The number of a step in its round, for a recording that stands for many steps."""

from __future__ import annotations

from typing import Any

from fedsim.engine.record import NotRecordable

TURNS = 4  # steps of a round that may each be of their own kind; from the next on all are of one


class Late(int):
    """The number of a step from `TURNS` on, of which nobody may ask more than that it is one.

    A recorded step stands for all of them.
    """

    def _compared(self, other: int, early: bool) -> bool:
        if not other < TURNS:
            raise NotRecordable("what a step does depends on its number in the round")
        return early

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self._compared(other, False) if isinstance(other, int) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return self._compared(other, True) if isinstance(other, int) else NotImplemented

    def __gt__(self, other: int) -> bool:
        return self._compared(other, True)

    def __ge__(self, other: int) -> bool:
        return self._compared(other - 1, True)

    def __lt__(self, other: int) -> bool:
        return self._compared(other - 1, False)

    def __le__(self, other: int) -> bool:
        return self._compared(other, False)

    def _asked(self, *_: Any) -> Any:
        raise NotRecordable("what a step does depends on its number in the round")

    __hash__ = __index__ = __int__ = __float__ = __str__ = __repr__ = __format__ = _asked
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _asked
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __divmod__ = __rdivmod__ = _asked
    __pow__ = __rpow__ = __neg__ = __abs__ = __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _asked
