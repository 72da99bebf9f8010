"""Everything that can be said of a server.

Decides which options exist and which values they take. Knows nothing of HTTP libraries or of the engine behind it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from pydantic import Field, SecretStr, field_validator

from lorax_core.options import Checked, Secret

KEY_LENGTH: Final = 8
"""Characters of the shortest API key: a shorter one is found by trying."""


class ServerOptions(Checked):
    """The options of `serve`; raises RequestError naming the option, its value and what is valid.

    - `host`, `port`: where to listen; port 0 takes a free one.
    - `model_name`: what clients call the base; by default the checkpoint's hub id, or the last part of its folder.
    - `api_keys`: one of them must come with every request (`Authorization: Bearer KEY`); without keys everyone who
      reaches the server may ask. `admin_key` is for the routes that load and unload adapters, which do not exist without it.
    - `max_queue`: sequences that may wait beyond those that a step computes; more are refused with 429.
    - `max_body_bytes`, `max_batch`: the largest body, and the most inputs of one request.
    - `max_schema_chars`: characters of the largest JSON schema or regular expression of a request.
    - `request_timeout`: seconds that an answer may take, also what a client can ask for at most (`X-Request-Timeout`).
    - `body_timeout`: seconds that a client may take to send its headers, and as many for its body.
    - `drain_timeout`: seconds that running requests have to finish after SIGTERM.
    - `cors_origins`: web pages of these origins may ask ("*" for any); none by default.
    - `page`: `GET /` is a page to try the server in a browser.
    - `log_format`: "text", or "json" with one object a line.
    """

    home: ClassVar[str] = "lorax_core.server.options"

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, lt=2**16)
    model_name: str | None = Field(default=None, min_length=1, max_length=4_096)
    api_keys: tuple[SecretStr, ...] = ()
    admin_key: Secret = None
    max_queue: int = Field(default=1_024, ge=0, lt=2**31)
    max_body_bytes: int = Field(default=16 * 2**20, ge=1, lt=2**31)
    max_batch: int = Field(default=1_024, ge=1, lt=2**31)
    max_schema_chars: int = Field(default=64 * 1024, ge=1, lt=2**31)
    request_timeout: float = Field(default=600.0, gt=0, le=86_400)
    body_timeout: float = Field(default=30.0, gt=0, le=3_600)
    drain_timeout: float = Field(default=30.0, ge=0, le=3_600)
    cors_origins: tuple[str, ...] = ()
    page: bool = True
    log_format: Literal["text", "json"] = "text"

    @field_validator("api_keys", mode="before")
    @classmethod
    def _secrets(cls, value: Any) -> Any:
        # What is no string must not be shown by the error about it either.
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, (str, SecretStr)) for one in value):
            raise ValueError("API keys are a list of strings")
        return tuple(SecretStr(one) if isinstance(one, str) else one for one in value)

    @field_validator("api_keys", "admin_key")
    @classmethod
    def _long_enough(cls, value: Any) -> Any:
        for key in value if isinstance(value, tuple) else [value] if value is not None else []:
            text = key.get_secret_value()
            # Of printable ASCII, or no client can send it.
            if len(text) < KEY_LENGTH or not (text.isascii() and text.isprintable()) or " " in text:
                raise ValueError(f"an API key has at least {KEY_LENGTH} characters, printable ASCII without spaces")
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _any_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value
