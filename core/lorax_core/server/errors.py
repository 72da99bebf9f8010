"""What a client is answered when something fails.

Decides the status of every error and what of its text a client may read: one table, `KINDS`, for all APIs. Each API has its own
shape of a body. Knows nothing of routes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lorax_core.errors import AdapterError, CapacityError, LoraxError, RequestError, StepError


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one kind of error is called: by OpenAI's clients with their status, and by those of LoRAX and TEI with theirs."""

    status: int
    openai: str
    code: str | None
    lorax_status: int
    lorax: str


KINDS: Final[Mapping[str, ErrorKind]] = {
    "invalid": ErrorKind(400, "invalid_request_error", None, 422, "validation"),
    "too_long": ErrorKind(400, "invalid_request_error", "context_length_exceeded", 422, "validation"),
    "unauthorized": ErrorKind(401, "authentication_error", "invalid_api_key", 401, "unauthorized"),
    "no_route": ErrorKind(404, "invalid_request_error", "not_found", 404, "not_found"),
    "no_model": ErrorKind(404, "invalid_request_error", "model_not_found", 404, "not_found"),
    "bad_adapter": ErrorKind(400, "invalid_request_error", "bad_adapter", 422, "validation"),
    "wrong_method": ErrorKind(405, "invalid_request_error", "method_not_allowed", 405, "method_not_allowed"),
    "slow_body": ErrorKind(408, "invalid_request_error", "request_timeout", 408, "timeout"),
    "too_large": ErrorKind(413, "invalid_request_error", "request_too_large", 413, "validation"),
    "overloaded": ErrorKind(429, "rate_limit_error", "overloaded", 429, "overloaded"),
    "internal": ErrorKind(500, "server_error", "internal_error", 500, "generation"),
    "unavailable": ErrorKind(503, "server_error", "unavailable", 503, "unhealthy"),
    "deadline": ErrorKind(504, "server_error", "deadline_exceeded", 504, "incomplete_generation"),
}


class Refused(LoraxError):
    """A request that the server itself does not answer; `kind` is one of `KINDS`.

    `param` is the field of the request that is wrong, dotted; `retry_after` the seconds after which trying again makes sense.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind, self.param, self.retry_after = kind, param, retry_after


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as clients may see it: no paths of this machine, no traceback."""

    kind: str
    message: str
    hint: str | None = None
    param: str | None = None
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer beyond the usual ones."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.kind == "unauthorized" else {})


def failure(error: BaseException) -> Failure:
    """What clients see of an error; of one that is not deliberate, nothing but that it happened."""
    if isinstance(error, StepError):
        inner = next((one for one in error.results if isinstance(one, LoraxError)), None)
        return failure(inner) if inner is not None else _of("internal", error)
    if isinstance(error, Refused):
        return _of(error.kind, error, error.param, error.retry_after)
    if isinstance(error, CapacityError):
        return _of("too_long", error)
    if isinstance(error, AdapterError):
        return _of("bad_adapter", error)
    if isinstance(error, RequestError):
        return _of("invalid", error)
    if isinstance(error, LoraxError):
        return _of("internal", error)
    if isinstance(error, UnicodeEncodeError):  # no text of ours has such a part, but JSON can spell it
        return Failure("invalid", "a text has half of a surrogate pair, which is no character", "send whole characters")
    return Failure("internal", "the server failed to answer this request", "its log has the cause, by the request id")


def _of(kind: str, error: LoraxError, param: str | None = None, retry_after: int | None = None) -> Failure:
    hint = None if error.hint is None else without_paths(error.hint)
    return Failure(kind, without_paths(error.message), hint, param, retry_after)


_PATH: Final = re.compile(r"(?<![\w.:/~-])(~?/[^\s'\"`,;:()<>|*?]+/)(?=[^/\s'\"`,;:()<>|*?])")


def without_paths(text: str) -> str:
    """`text` with folders of this machine cut off from what lies in them: where they are is nobody's business outside."""
    return _PATH.sub(lambda found: ".../" if _here(found[1]) else found[1], text)


def _here(folder: str) -> bool:
    """Whether a path starts in a folder of this machine, and is no route such as /v1/models."""
    return folder.startswith("~") or Path("/", folder.split("/")[1]).exists()


# --- shapes: the body of each API, with its status ---


def openai_body(found: Failure) -> tuple[int, dict[str, Any]]:
    """`{"error": {"message", "type", "param", "code"}}`, and the hint beside them where there is one."""
    kind = KINDS[found.kind]
    error: dict[str, Any] = {
        "message": found.message,
        "type": kind.openai,
        "param": found.param,
        "code": kind.code,
    }
    return kind.status, {"error": error | ({} if found.hint is None else {"hint": found.hint})}


def lorax_body(found: Failure) -> tuple[int, dict[str, Any]]:
    """`{"error", "error_type"}`, as LoRAX and TEI have it, and the hint beside them where there is one."""
    kind = KINDS[found.kind]
    message = found.message if found.param is None else f"{found.param}: {found.message}"
    body: dict[str, Any] = {"error": message, "error_type": kind.lorax}
    return kind.lorax_status, body | ({} if found.hint is None else {"hint": found.hint})


def body_of(path: str, found: Failure) -> tuple[int, dict[str, Any]]:
    """Status and body for the API that a path belongs to."""
    return openai_body(found) if path.startswith("/v1/") else lorax_body(found)
