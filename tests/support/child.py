"""A piece of a test in a process of its own, which may die of it."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_SECONDS = 60


class ChildError(Exception):
    """It failed: the message shows how."""


class SignalError(ChildError):
    """It died of a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"died of {signal.Signals(number).name}")
        self.number = number


def in_child(work: Callable[[], T]) -> T:
    """What ``work`` returns in a fork of this process, which has a minute for it; to be pickled.

    Raises:
        ChildError: it did not return.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        code = 1
        try:
            faulthandler.disable()  # a death that is looked for needs no report
            signal.alarm(_SECONDS)
            answer: Any = None
            try:
                answer = work()
                code = 0
            except BaseException:
                answer = traceback.format_exc()
            with open(writable, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(code)
    os.close(writable)
    with open(readable, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        raise SignalError(-status)
    if status:
        raise ChildError(pickle.loads(data) if data else f"status {status}")
    answer_: T = pickle.loads(data)
    return answer_


def died_of(work: Callable[[], object]) -> int:
    """The signal that a fork of this process died of while doing that work; 0 where it came to its end."""
    try:
        in_child(lambda: repr(work()))  # which can be pickled, whatever it is
    except SignalError as error:
        return error.number
    return 0
