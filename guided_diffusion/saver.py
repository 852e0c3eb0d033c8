"""Writes checkpoints while training goes on. Knows files and states, not what is in them."""

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch as th

from . import checkpoint


class Saver:
    """
    Writes sets of checkpoint files in the background, one set at a time, and keeps the newest ones. The end of a with
    block waits for what is being written; it raises where that fails, unless another error is on its way.

    :param folder: a folder or blobfile URL; it is made with the first set.
    :param keep: how many sets stay; None keeps all. Only local folders are thinned out.
    :param config: written as config.json beside the first set.
    """

    def __init__(self, folder: str, keep: int | None = None, config: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.config = config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        checkpoint.remove_leftovers(folder)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._join()
        if error is None:
            self.check()

    def save(self, states: dict[str, dict], then: Callable[[], None] = lambda: None) -> None:
        """
        Take a copy of a set of states, and write it while the caller goes on; waits for the set before.

        :param states: file name -> state, in the order of writing; the last makes the set whole.
        :param then: called when all is written, by the writing thread.
        :raises OSError: where the set before could not be written.
        """
        self.wait()
        copies = {name: snapshot(state) for name, state in states.items()}
        self._thread = threading.Thread(target=self._write, args=(copies, then), name="saver")
        self._thread.start()

    def wait(self) -> None:
        """
        Wait until everything is written.

        :raises OSError: where it could not be.
        """
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """:raises OSError: where writing has failed, without waiting for what is being written."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, states: dict[str, dict], then: Callable[[], None]) -> None:
        try:
            if "://" not in self.folder:
                os.makedirs(self.folder, exist_ok=True)
                if self.config is not None:
                    checkpoint.save_config(self.folder, self.config)
            for name, state in states.items():
                checkpoint.save(state, self.folder, name)
            if self.keep is not None and "://" not in self.folder:
                checkpoint.prune(self.folder, self.keep, newest=checkpoint.parse_step(name))
            then()
        except BaseException as error:  # it reaches the caller by check
            self._error = error


def snapshot(state: Any) -> Any:
    """:return: a state with contiguous copies of its tensors, on the CPU; nothing done to the state shows in it."""
    if isinstance(state, th.Tensor):
        return state.detach().to("cpu", copy=True, memory_format=th.contiguous_format)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, (list, tuple)) else state
