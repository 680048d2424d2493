"""What the store does by itself from time to time, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from overtone.errors import OvertoneError

_log = logging.getLogger(__name__)


class Upkeep:
    """Calls each task once an interval until `close`. A task that fails is called again next time."""

    def __init__(self, tasks: Sequence[Callable[[], object]], every_s: float) -> None:
        self._tasks, self._every_s = tasks, every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="overtone-upkeep", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            for task in self._tasks:
                try:
                    task()
                except Exception as error:  # nobody else would hear of it, and the thread must go on
                    if not self._end.is_set():
                        _log.warning(
                            "the store's upkeep failed: %s", error, exc_info=not isinstance(error, OvertoneError)
                        )

    @property
    def ending(self) -> bool:
        """Whether a task that takes long should stop."""
        return self._end.is_set()

    def close(self) -> None:
        """On return no task runs."""
        self._end.set()
        self._thread.join()
