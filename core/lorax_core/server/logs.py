"""A line for each request, and the id by which it is found.

Decides what a server logs: one line a request, as text or as JSON, never a body, a key or a header of a client but its request
id. Knows nothing of routes.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
import uuid
from typing import Any, Final

from lorax_core.server.errors import Failure

log: Final = logging.getLogger("lorax_core.server")
request_id: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("lorax_request_id", default="")
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def new_request_id(given: str | None) -> str:
    """The client's own id where it is short and plain, else a new one: it goes into headers and logs."""
    return given if given is not None and _ID.fullmatch(given) else uuid.uuid4().hex


def log_failure(found: Failure, error: BaseException) -> None:
    """Log an error with its traceback when its answer says no more than that it happened."""
    if found.kind == "internal":
        log.error("a request failed", exc_info=error)


class JsonLines(logging.Formatter):
    """One JSON object a line; what a record carries in `fields` is part of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if found := request_id.get():
            entry["request_id"] = found
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=True, default=str)


def json_line(message: str) -> str:
    """What is said before there is a server, as a line of its log."""
    return JsonLines().format(logging.makeLogRecord({"msg": message, "levelno": logging.INFO, "levelname": "INFO"}))


class TextLines(logging.Formatter):
    """Time, level, message and the fields as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line, with a traceback below it where there is one."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        line = f"{at} {record.levelname.lower():7} {record.getMessage()}{fields}"
        if not (line.isascii() and line.isprintable()):  # a line break would forge a line, other signs steer a terminal
            line = line.encode("unicode_escape").decode("ascii")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up_logs(kind: str) -> None:
    """Send what the server and uvicorn log to stderr, as `kind` ("text" or "json") says. For a process that is a server."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    for name in ("lorax_core", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # there is a line for each request already
