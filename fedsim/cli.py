"""The command line: `fedsim VERB overrides…`.

Imports nothing heavy before it is needed: `--help` and `--version` load neither Hydra nor torch nor Flower.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fedsim import __version__, plugins
from fedsim.actions import Arguments
from fedsim.children import kill_server
from fedsim.errors import UserError, did_you_mean, place_of
from fedsim.verbs import VERBS, Verb

DONE, FAILED, WRONG_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted, 143 terminated."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a log in ASCII loses a dash, not the run
    verbose = any(word in ("-v", "--verbose") for word in words)
    terminated = threading.Event()
    try:
        with _stopped_by(signal.SIGTERM, terminated):
            return _dispatch([word for word in words if word not in ("-v", "--verbose")])
    except UserError as error:
        return _report(error, str(error), WRONG_INPUT, verbose=verbose)
    except KeyboardInterrupt as error:
        kill_server()
        code = TERMINATED if terminated.is_set() else INTERRUPTED
        return _report(error, str(error) or "interrupted", code, verbose=verbose)
    except BrokenPipeError:  # `fedsim list | head`
        from fedsim.console import discard

        discard(sys.stdout)
        return DONE
    except Exception as error:  # the last place where a failure can become one line
        first = (str(error).strip().splitlines() or [""])[0]
        kind = "" if type(error) is RuntimeError and first else f"{type(error).__name__}: "
        place = place_of(error)
        hint = "" if verbose else f" ({place}; -v shows more)" if place else " (-v shows where)"
        return _report(error, f"{kind}{first}{hint}", FAILED, verbose=verbose)


@contextmanager
def _stopped_by(number: signal.Signals, seen: threading.Event) -> Iterator[None]:
    """Let a signal that schedulers send before a time limit end the command as Ctrl-C does, its processes with it."""

    def interrupt(*_: object) -> NoReturn:
        seen.set()
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(number) is not signal.SIG_DFL:  # its owner knows better
        yield
        return
    signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def _report(error: BaseException, line: str, code: int, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    print(f"fedsim: {line}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] in ("-V", "--version"):
        print(f"fedsim {__version__}")
    elif words[0] not in VERBS:
        _refuse_verb(words[0])
    else:
        _run_verb(words[0], words[1:])
    return DONE


def _refuse_verb(word: str) -> NoReturn:
    if "=" in word:
        raise UserError(f"the command comes first: fedsim run {word.lstrip('-')}")
    raise UserError(f"no command {word!r}{did_you_mean(word, VERBS)}")


def _run_verb(name: str, words: list[str]) -> None:
    verb = VERBS[name]
    parser = _Parser(
        prog=f"fedsim {name}",
        usage=_usage(name, verb),
        description=verb.summary + ".\n\n" + textwrap.dedent(verb.details).strip(),
        epilog=plugins.help_text() if verb.takes == "name=value" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("words", nargs="*", metavar=verb.takes, help=argparse.SUPPRESS)
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="folder of further choices: DIR/strategy/x.yaml")
    for option, text in verb.options.items():
        parser.add_argument(f"--{option}", metavar=option.upper(), help=text)
    for flag, text in verb.flags.items():
        parser.add_argument(f"--{flag}", action="store_const", const="", help=text)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("-V", "--version", action="version", version=f"fedsim {__version__}", help="show the version")
    parser.add_argument("-h", "--help", action="help", help="show this help")
    try:
        given, unknown = parser.parse_known_intermixed_args(words)
    except SystemExit:  # --help and --version have printed
        return
    if unknown:
        bare = unknown[0].lstrip("-").replace("-", "_")
        hint = f"; a setting is written without dashes: {bare}" if bare else ""
        raise UserError(f"fedsim {name} has no option {unknown[0]!r}{hint}")
    for line in plugins.installed()[1]:
        print(f"warning: {line}", file=sys.stderr)
    _make_importable(Path.cwd())
    known = (*verb.options, *verb.flags)
    options = {option: value for option in known if (value := getattr(given, option)) is not None}
    with _warnings_in_lines():
        verb.act(Arguments(given.words, given.config_dir, options))


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Show warnings that are meant for users as lines like all others, without a place in the code."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"warning: {message}", file=sys.stderr)
        else:
            before(message, category, *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _usage(name: str, verb: Verb) -> str:
    more = "" if name in ("list", "compare", "new") else " ..."
    options = " [options]" if verb.options or verb.flags else ""
    return f"fedsim {name} [{verb.takes}{more}]{options} [--config-dir DIR] [-v]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _make_importable(folder: Path) -> None:
    """Let `_target_: my_module.MyRule` find a module beside the user, behind all that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    added = f"{text}\n\n" if (text := plugins.help_text()) else ""
    return f"""\
usage: fedsim COMMAND [name=value ...] [--config-dir DIR] [-v]

Federated-learning simulation for heterogeneous clients.

commands:
{verbs}

examples:
  fedsim run strategy=fedld partition.alpha=0.1
  fedsim run resume=outputs/2026-01-31/12-00-00-fedld num_rounds=200
  fedsim partition partition=shards partition.num_clients=100
  fedsim list strategy

{added}Each command has its own --help. -v shows the traceback of an error, --version the version.
Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted, 143 terminated."""
