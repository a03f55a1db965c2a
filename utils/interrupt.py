"""Ctrl-C that waits for a good moment: the first one asks, the second one insists. So do kill and a lost terminal."""
from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

HANGUP = "SIGHUP"  # unknown to Windows, so by name
SIGNALS = tuple(number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", HANGUP))


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP set `requested`; a second one raises KeyboardInterrupt at once.

    A signal that is ignored stays so (nohup). A terminal that closes may send several hang-ups, so those never insist.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if signal.Signals(number).name == HANGUP:
                return
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this chunk; what was made is kept (once more to stop at once)")
