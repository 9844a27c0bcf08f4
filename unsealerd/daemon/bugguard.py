"""What becomes of a connection on whose way something broke that should not."""

import logging
from collections.abc import Callable
from types import TracebackType

_log = logging.getLogger(__name__)


class BugGuard:
    """Ends the connection on an exception that nothing should raise, and logs where and of which type.

    Not its text: that could quote what a peer sent, or worse.
    """

    __slots__ = ("_abort",)

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, bug: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
        _log.error("handler_bug type=%s at=%s", kind.__name__, where)
        self._abort()
        return True
