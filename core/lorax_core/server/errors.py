"""What a client is answered when something fails.

Decides the status of every error and what of its text a client may read: one table, `KINDS`, for all APIs. Each API has its own
shape of a body. Knows nothing of routes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from lorax_core.errors import AdapterError, CapacityError, LoraxError, RequestError, StepError


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one kind of error is called: by OpenAI's clients with their status, by those of LoRAX and of TEI with theirs."""

    status: int
    openai: str
    code: str | None
    lorax_status: int
    lorax: str
    tei_status: int
    tei: str


_INVALID: Final = "invalid_request_error"
KINDS: Final[Mapping[str, ErrorKind]] = {
    "invalid": ErrorKind(400, _INVALID, None, 422, "validation", 422, "Validation"),
    "too_long": ErrorKind(400, _INVALID, "context_length_exceeded", 422, "validation", 413, "Validation"),
    "unauthorized": ErrorKind(401, "authentication_error", "invalid_api_key", 401, "unauthorized", 401, "Unauthorized"),
    "no_route": ErrorKind(404, _INVALID, "not_found", 404, "not_found", 404, "NotFound"),
    "no_model": ErrorKind(404, _INVALID, "model_not_found", 404, "not_found", 404, "NotFound"),
    "bad_adapter": ErrorKind(400, _INVALID, "bad_adapter", 422, "validation", 422, "Validation"),
    "wrong_method": ErrorKind(405, _INVALID, "method_not_allowed", 405, "method_not_allowed", 405, "MethodNotAllowed"),
    "slow_body": ErrorKind(408, _INVALID, "request_timeout", 408, "timeout", 408, "Timeout"),
    "too_large": ErrorKind(413, _INVALID, "request_too_large", 413, "validation", 413, "Validation"),
    "overloaded": ErrorKind(429, "rate_limit_error", "overloaded", 429, "overloaded", 429, "Overloaded"),
    "internal": ErrorKind(500, "server_error", "internal_error", 424, "generation", 424, "Backend"),
    "unavailable": ErrorKind(503, "server_error", "unavailable", 503, "unhealthy", 503, "Unhealthy"),
    "deadline": ErrorKind(504, "server_error", "deadline_exceeded", 504, "incomplete_generation", 504, "Backend"),
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
    option: str | None = None
    """The option of the engine's request that is wrong: what a route calls it is the route's to say."""

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
        return _of("too_long", error, option=error.option)
    if isinstance(error, AdapterError):
        return _of("bad_adapter", error)
    if isinstance(error, RequestError):
        return _of("invalid", error, option=error.option)
    if isinstance(error, LoraxError):
        return _of("internal", error)
    if isinstance(error, UnicodeEncodeError):  # no text of ours has such a part, but JSON can spell it
        return Failure(
            "invalid", "a text has half of a surrogate pair, which is not a character", "send whole characters"
        )
    return Failure("internal", "the server failed to answer this request", "its log has the cause, by the request id")


def _of(
    kind: str,
    error: LoraxError,
    param: str | None = None,
    retry_after: int | None = None,
    *,
    option: str | None = None,
) -> Failure:
    hint = None if error.http_hint is None else without_paths(_NEAREST.sub("", error.http_hint)) or None
    # Errors of the Python interface begin with the option, where they name one.
    message = error.message.removeprefix(f"{param or option}: ")
    # A route is no folder of this machine.
    message = message if kind == "no_route" else without_paths(message)
    return Failure(kind, message, hint, param, retry_after, option)


_PATH: Final = re.compile(r"(?<![\w.:/~-])(~?/[^\s'\"`,;:()<>|*?]+/)(?=[^/\s'\"`,;:()<>|*?])")


_NEAREST: Final = re.compile(r"^did you mean '[~/].*'\?$", re.S)
"""A hint that is nothing but a folder of this machine."""


_ROUTES: Final = frozenset({"v1", "v2", "tei"})
"""How routes of several parts begin."""


def without_paths(text: str) -> str:
    """`text` with folders of this machine cut off from what lies in them: clients do not learn where they are."""
    return _PATH.sub(lambda found: ".../" if _here(found[1]) else found[1], text)


def _here(folder: str) -> bool:
    """Whether a path is no route such as /v1/models. What there is on the disk must not decide it: clients would learn that."""
    return folder.startswith("~") or folder.split("/")[1] not in _ROUTES


_OPENAI: Final = ("/v1/", "/v2/", "/rerank", "/chat/", "/completions", "/embeddings", "/models")
"""How paths of OpenAI's API begin, also where a client's address lacks /v1, and of those whose clients know its errors."""


# --- shapes: the body of each API, with its status ---


def openai_body(found: Failure) -> tuple[int, dict[str, Any]]:
    """`{"error": {"message", "type", "param", "code"}}`, and the hint beside them where there is one."""
    kind = KINDS[found.kind]
    # OpenAI's own client shows the message alone.
    named = found.param is None or found.param in found.message
    error: dict[str, Any] = {
        "message": found.message if named else f"{found.param}: {found.message}",
        "type": kind.openai,
        "param": found.param,
        "code": kind.code,
    }
    return kind.status, {"error": error | ({} if found.hint is None else {"hint": found.hint})}


def lorax_body(found: Failure) -> tuple[int, dict[str, Any]]:
    """`{"error", "error_type"}`, as LoRAX has it, and the hint beside them where there is one."""
    kind = KINDS[found.kind]
    return kind.lorax_status, _plain_body(found, kind.lorax)


def tei_body(found: Failure) -> tuple[int, dict[str, Any]]:
    """The same with TEI's names and statuses."""
    kind = KINDS[found.kind]
    return kind.tei_status, _plain_body(found, kind.tei)


def _plain_body(found: Failure, error_type: str) -> dict[str, Any]:
    message = found.message if found.param is None else f"{found.param}: {found.message}"
    return {"error": message, "error_type": error_type} | ({} if found.hint is None else {"hint": found.hint})


_FIELDS: Final[Mapping[str, Mapping[str, str]]] = {
    "/v1/chat/": {"prompt": "messages"},
    "/v1/": {},
    "/tei/decode": {"token_ids": "ids"},
    "": {"prompt": "inputs", "input": "inputs", "max_tokens": "max_new_tokens"},
}
"""What fields are called by the routes that begin so, where the options of the engine's requests are called otherwise."""


def body_of(path: str, found: Failure) -> tuple[int, dict[str, Any]]:
    """Status and body for the API that a path belongs to."""
    if found.option is not None:
        names = next(_FIELDS[one] for one in _FIELDS if path.startswith(one))
        # A query and its document are one input.
        ranked = found.option == "input" and path.endswith("/rerank")
        found = replace(found, param=None if ranked else names.get(found.option, found.option))
    if path.startswith(_OPENAI):
        return openai_body(found)
    return tei_body(found) if path == "/tei" or path.startswith("/tei/") else lorax_body(found)
