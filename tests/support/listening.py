"""A server on loopback, in a thread, for clients that need a socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorax_core.server.app import build_app
from lorax_core.server.options import ServerOptions
from lorax_core.server.run import address, listen, make_server


@contextmanager
def listening(engine: Any, **options: Any) -> Iterator[str]:
    """The address of a server of this engine, which ends with the block."""
    chosen = ServerOptions(**{"port": 0, "drain_timeout": 1, **options})
    bound = listen(chosen)
    bound.listen(128)  # clients may connect before the thread runs
    server = make_server(build_app(engine, chosen, model_name="base"), chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield address(bound)
    finally:
        server.should_exit = True
        thread.join(30)
