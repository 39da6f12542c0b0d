"""SIGINT and SIGTERM ask a run to stop: at once where there is nothing to save yet, else between two steps."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(BaseException):
    """A signal (its number in `signal`) asked the run to stop; its state is saved. No `except Exception` takes it."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Makes a signal an Interrupted where it finds the program, for there is nothing to save yet."""

    def handle(number: int, _: Any) -> None:
        raise Interrupted(number, "stopped before the first step; the same command begins again")

    with _handled(handle):
        yield


@contextlib.contextmanager
def between_steps() -> Iterator[list[int]]:
    """Collects signals instead of dying of them; the loop looks between steps."""
    came: list[int] = []

    def handle(number: int, _: Any) -> None:
        came.append(number)
        # not print: a signal may come inside one, which is not reentrant
        os.write(2, f"signal {number}: stopping after this step\n".encode())

    with _handled(handle):
        yield came


@contextlib.contextmanager
def _handled(handle: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
