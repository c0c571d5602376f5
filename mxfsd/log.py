"""Logging: structlog with key=value on a terminal and JSON otherwise; volume, node and epoch in each line.

``configure`` is called once a process. The three fields come from one mutable ``LogContext`` that the daemon keeps
up to date, so a line always carries the epoch at which it was written, whichever task writes it. structlog itself
takes 50 ms to import; this module imports it only when a logger is made or configured.
"""

import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


@dataclass(slots=True)
class LogContext:
    """What every line of this process says about where it comes from; None is left out."""

    volume: str | None = None
    node: str | None = None
    epoch: int | None = None


context = LogContext()
"""The process's own context: set its fields, e.g. ``log.context.epoch = 7``."""


class AddContext:
    """A structlog processor that adds the fields of a LogContext to each event that has not set them itself."""

    def __init__(self, source: LogContext) -> None:
        self._source = source

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        source = self._source
        for name in ("volume", "node", "epoch"):
            value = getattr(source, name)
            if value is not None:
                event.setdefault(name, value)
        return event


def configure(
    stream: TextIO | None = None,
    *,
    json: bool | None = None,
    level: str = "info",
    source: LogContext = context,
) -> None:
    """Send this process's log to *stream* (standard error by default).

    *json* None means: JSON unless the stream is a terminal. *level* is one of LEVELS (KeyError else). Python's own
    ``logging`` records of warnings and errors (asyncio's, mainly) come out in the same form.
    """
    import structlog

    out = sys.stderr if stream is None else stream
    as_json = not out.isatty() if json is None else json
    shared: list[Processor] = [
        AddContext(source),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if as_json:
        last: list[Processor] = [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        last = [
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "event"], bool_as_flag=False, drop_missing=True
            ),
        ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    _join_stdlib()


def _join_stdlib() -> None:
    """Route warnings and errors of the standard library's ``logging`` into structlog."""
    import logging

    class ToStructlog(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            info = record.exc_info if record.exc_info and record.exc_info[0] else None
            get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=info)

    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler).__name__ == ToStructlog.__name__:
            root.removeHandler(handler)
    handler = ToStructlog(logging.WARNING)
    root.addHandler(handler)


def get_logger(part: str, **fields: Any) -> "FilteringBoundLogger":
    """Return a logger whose lines carry ``part=`` (the module or task) and *fields*.

    It follows a later ``configure``, so it may be made at import time.
    """
    import structlog

    logger: FilteringBoundLogger = structlog.get_logger(part=part, **fields)
    return logger
