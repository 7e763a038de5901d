"""What a run says on a terminal, in a log, and from Python."""

import io
import math
import os
from typing import Any

import pytest
from rich.console import Console

from fedsim import console
from fedsim.console import Live, Observer, Plain, open_observer
from fedsim.quantities import show

SUMMARY = {"accuracy": 0.94722, "rounds": 40, "clients": {"worst_accuracy": 0.5}, "per_class": [1, 2], "seconds": None}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(observer: Observer, total: int = 40, done: int = 0) -> None:
    observer.plan("sequential on cpu [bold, fast]")
    observer.note("client=sgd is used")
    observer.start(total, done)
    for number in range(done + 1, total + 1):
        observer.round({"round": number, "accuracy": number / total, "loss": 1 / number})
    observer.warn("1 update [of 10] was dropped")
    observer.finish(SUMMARY)


def test_plain_writes_about_twenty_rounds_and_the_last() -> None:
    stream = io.StringIO()
    with Plain(stream) as observer:
        tell(observer)
    lines = stream.getvalue().splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert [int(line.split()[1].split("/")[0]) for line in rounds] == [1, *range(2, 41, 2)]
    assert rounds[1].startswith("round  2/40  accuracy 5.00 %  loss 0.5000  ")
    assert rounds[1].endswith(" left")
    assert rounds[-1] == "round 40/40  accuracy 100.00 %  loss 0.0250"
    assert lines[:2] == ["plan: sequential on cpu [bold, fast]", "note: client=sgd is used"]
    assert "clients worst accuracy  50.00 %" in lines
    assert lines[-1].startswith("clients worst")  # neither the list nor what is not known
    assert "\033" not in stream.getvalue()


def test_plain_counts_on_from_a_resumed_round() -> None:
    stream = io.StringIO()
    tell(Plain(stream, num_lines=2), total=9, done=6)
    rounds = [line.split()[1] for line in stream.getvalue().splitlines() if line.startswith("round ")]
    assert rounds == ["7/9", "9/9"]


def test_plain_breaks_a_long_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))  # 20 s a round
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    tell(Plain(stream, num_lines=1, seconds=30), total=6)
    rounds = [line.split()[1] for line in stream.getvalue().splitlines() if line.startswith("round ")]
    assert rounds == ["1/6", "3/6", "5/6", "6/6"]
    assert "round 3/6  accuracy 50.00 %  loss 0.3333  1 min 0 s left" in stream.getvalue()


def test_plain_marks_figures_of_an_earlier_round() -> None:
    stream = io.StringIO()
    observer = Plain(stream)
    observer.start(2, 0)
    observer.round({"round": 1, "accuracy": 0.5, "evaluated": True})
    observer.round({"round": 2, "accuracy": 0.5, "evaluated": False})
    first, second = stream.getvalue().splitlines()
    assert first.startswith("round 1/2  accuracy 50.00 %  ")
    assert second == "round 2/2  accuracy 50.00 %  (as last evaluated)"


def test_plain_warns_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    tell(Plain(stream))
    assert "warning" not in stream.getvalue()
    assert capsys.readouterr().err == "warning: 1 update [of 10] was dropped\n"


def test_a_closed_pipe_stops_nobody() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream, Plain(stream) as observer:
        tell(observer)


def test_live_draws_a_bar_and_tables() -> None:
    stream = Terminal()
    drawn = Console(file=stream, force_terminal=True, width=80, color_system=None)
    with Live(console=drawn) as observer:
        tell(observer)
        observer.skew([("label TV", 0.43, "distance to the pool"), ("clients", 20, "")])
    text = stream.getvalue()
    assert "plan: sequential on cpu [bold, fast]" in text  # brackets are no markup
    assert "1 update [of 10] was dropped" in text
    assert "40/40" in text
    assert "accuracy 100.00 %  loss 0.0250" in text
    assert "94.72 %" in text
    assert "distance to the pool" in text
    assert text.count("\033[?25l") == text.count("\033[?25h")  # the cursor is given back


def test_live_gives_the_cursor_back_after_an_error() -> None:
    stream = Terminal()
    observer = Live(console=Console(file=stream, force_terminal=True, width=80))
    try:
        with observer:
            observer.start(10, 0)
            observer.round({"round": 1})
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert stream.getvalue().count("\033[?25h") == 1


def test_live_draws_no_bar_for_a_run_that_has_its_rounds() -> None:
    stream = Terminal()
    with Live(console=Console(file=stream, force_terminal=True, width=80)) as observer:
        observer.start(60, 144)
        observer.finish(SUMMARY)
    assert "144/60" not in stream.getvalue()
    assert "94.72 %" in stream.getvalue()


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tell(Observer())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [
        (Terminal(), "xterm", Live),
        (Terminal(), "dumb", Plain),
        (Terminal(), "", Plain),
        (io.StringIO(), "xterm", Plain),
    ],
)
def test_the_stream_decides(stream: io.StringIO, term: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert isinstance(open_observer(stream), kind)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 1.0, "100.00 %"),
        ("test.worst_10_accuracy", 0.5, "50.00 %"),
        ("loss", math.nan, "nan"),
        ("rounds", 1234567, "1,234,567"),
        ("early", True, "True"),
        ("folder", "a/b", "a/b"),
        ("accuracy", None, "-"),
        ("bytes_down", 0, "0 B"),
        ("bytes_down", 1.5e16, "15000.0 TB"),
        ("seconds", 0.0, "0 ms"),
        ("seconds", 3599.6, "1 h 0 min"),
        ("seconds", 9.97, "10 s"),
    ],
)
def test_values_are_shown_by_their_names(name: str, value: Any, text: str) -> None:
    assert show(name, value) == text


def test_plain_skew_is_a_table() -> None:
    stream = io.StringIO()
    Plain(stream).skew([("label TV", 0.43, "to the pool"), ("clients", 20, "")])
    assert stream.getvalue() == "label TV  0.43  to the pool\nclients   20\n"
