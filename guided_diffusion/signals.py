"""SIGTERM and SIGUSR1, by which clusters announce that they will end a job. Knows nothing of what is stopped."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """
    While the with block runs, remembers that this process was asked to stop rather than stopping it.

    Outside the main thread, where Python handles no signals, it never is.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, object] = {}

    def __bool__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
