"""Jobs on a thread of their own. Knows nothing of what they do."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """
    Runs jobs on one thread, in order, so that encoding files does not hold sampling up.

    Used in a with block, which waits for all of them; what a job raises comes up at a later call or at the end, and the
    jobs after it are left undone.

    :param waiting: how many jobs may wait; one more waits for room.
    """

    def __init__(self, waiting: int = 64) -> None:
        self.waiting = waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._jobs: deque[Future] = deque()
        self._failed = False

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __call__(self, job: Callable[[], None]) -> None:
        """Put a job in the queue."""
        while self._jobs and (self._jobs[0].done() or len(self._jobs) > self.waiting):
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(self._run, job))

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            for job in self._jobs:
                job.result()

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise
