"""Calls of C that take long on the CPU, which Ctrl-C can stop.

Python runs the handlers of signals in its main thread, between two steps of Python code: a call of C in the
main thread would keep them waiting. So a long call from the main thread runs in a thread of its own, and the
main thread waits for it in Python. If a handler raises (KeyboardInterrupt, or anything else: a timeout's
exception, SystemExit), C is told to stop, and the exception goes on once C has, since C uses the caller's
arrays until then. What the call has written is unspecified in that case. A handler that returns changes
nothing.

In other threads Python runs no handlers, so there C is called as it is.
"""

from __future__ import annotations

import _thread
import ctypes
import threading
from typing import Any, Callable

from . import _lib

_LOOK_AGAIN_SECONDS = 0.05  # a signal may have come to another thread, which does not wake the main thread
_NEVER_BEGAN_SECONDS = 5.0


def call(function: Callable[..., int], params: _lib.FwdParams, *more: Any) -> None:
    """function(params, *more). params.interrupt is this function's. Raises the exception of C's status."""
    if threading.get_ident() == threading.main_thread().ident:
        own = type(params).from_buffer_copy(params)  # a handler may use the caller's struct for its own call
        if _Helper(function, own, more).run():
            return
    status = function(ctypes.byref(params), *more)
    if status:
        raise _lib.last_error(status)


class _Helper:
    """One call of C in a thread of its own."""

    def __init__(self, function: Callable[..., int], params: _lib.FwdParams, more: tuple[Any, ...]):
        self._call = function, params, more
        self._interrupt = ctypes.c_int32(0)
        params.interrupt = ctypes.addressof(self._interrupt)
        self._error: Exception | None = None
        self._ended = _thread.allocate_lock()
        self._ended.acquire()
        self._done = False

    def run(self) -> bool:
        """False if there is no thread to be had."""
        started = False
        try:
            try:
                _thread.start_new_thread(self._work, ())
            except RuntimeError:
                return False
            started = True
            while not self._ended.acquire(timeout=_LOOK_AGAIN_SECONDS):
                pass
        except BaseException:
            self._stop(started)
            raise
        if self._error is not None:
            raise self._error
        return True

    def _work(self) -> None:
        try:
            function, params, more = self._call
            status = function(ctypes.byref(params), *more)
            if status:
                self._error = _lib.last_error(status)  # the sentence is this thread's
        finally:
            self._done = True
            self._ended.release()

    def _stop(self, started: bool) -> None:
        """Ends the call. More exceptions of handlers are dropped: one is under way already. A handler may
        also run between two rounds of the loop in _wait_for_end, where its `except` does not reach. Therefore
        the wait begins anew, twice."""
        try:
            self._wait_for_end(started)
        except BaseException:
            try:
                self._wait_for_end(started)
            except BaseException:
                self._wait_for_end(started)

    def _wait_for_end(self, started: bool) -> None:
        while not self._done:
            try:
                self._interrupt.value = 1
                # If the handler ran right beside the start of the thread, it is not known whether there is
                # one. It would find the number set, and give up before it looks at an array. The lock may
                # have been taken by a round that a handler ended: `_done` says so.
                seconds = _LOOK_AGAIN_SECONDS if started else _NEVER_BEGAN_SECONDS
                if not self._ended.acquire(timeout=seconds) and not started:
                    return
            except BaseException:
                continue
