"""A command in a process of its own, which gets the signals that come to ours."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from research import signals
from research.config import ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Interrupted(Exception):
    """A signal stopped a run, which has saved its state. `code` is the exit code to leave with."""

    def __init__(self, code: int):
        super().__init__(f"stopped, exit code {code}; the same command goes on from there")
        self.code = code


def run_child(command: Sequence[str]) -> int:
    """Exit code of a command that writes to this process's output; signals that come are handed on to it.

    The child has a session of its own: Ctrl-C reaches it once, through us. Where we are killed, Linux tells it to save
    and stop: it would hold its folder, and the accelerator. Raises: Interrupted after such a signal.
    """
    received: list[int] = []
    child: list[subprocess.Popen] = []

    def hand_on(number: int, _: Any) -> None:
        received.append(number)
        if child:
            child[0].send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        child.append(subprocess.Popen(command, start_new_session=True, preexec_fn=ended_with_us()))
        if received:  # while it was starting
            child[0].send_signal(received[-1])
        code = child[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = 128 - code if code < 0 else code  # killed by a signal: as shells say it
    if received:
        raise Interrupted(code or 128 + received[0])
    return code


def ended_with_us() -> Callable[[], Any] | None:
    """For Popen's preexec_fn: where this process is killed, Linux ends the child as well."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # found now: between fork and exec little is allowed
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_code(study: Callable[[], int]) -> int:
    """Of a study; a mistake in its config is one line and 2, a signal that stopped a run is said, with that run's."""
    try:
        return study()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code


def checked(check: Callable[[], int]) -> int:
    """The exit code of a check of configs, which may build corpora; where a signal stops it, 128 and its number."""
    try:
        with signals.at_once():
            return check()
    except signals.Interrupted as stopped:
        return 128 + stopped.signal
