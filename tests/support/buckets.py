"""A store of this machine that speaks S3 as far as reading a folder needs it: ListObjectsV2, HeadObject, GetObject.

Decides nothing; signatures are not checked, only that there is one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

EPOCH = 1_700_000_000


class Bucket:
    """Objects by key, in a bucket of any name, on a free port. `after` hears each key whose content is given out."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.after: list[Callable[[str], None]] = []
        self.requests: list[tuple[str, str]] = []  # method and key; of a listing, the prefix with a star
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def downloaded(self) -> list[str]:
        """Keys whose content was given out, in order."""
        return [key for method, key in self.requests if method == "GET" and not key.endswith("*")]

    def listed(self, prefix: str) -> bytes:
        """ListObjectsV2 with the delimiter "/"."""
        below = {key: body for key, body in sorted(self.objects.items()) if key.startswith(prefix)}
        folders = {prefix + key[len(prefix) :].partition("/")[0] + "/" for key in below if "/" in key[len(prefix) :]}
        told = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size><ETag>&quot;{_etag(body)}&quot;</ETag>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key, body in below.items()
            if "/" not in key[len(prefix) :]
        ]
        told += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        body = f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(told)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f'<ListBucketResult xmlns="{space}">{body}{"".join(told)}</ListBucketResult>'.encode()


def _handler_of(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            at = urlsplit(self.path)
            key = unquote(at.path).lstrip("/").partition("/")[2]
            prefix = parse_qs(at.query).get("prefix", [""])[0]
            bucket.requests.append((self.command, key or f"{prefix}*"))
            if "Authorization" not in self.headers:
                self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            elif not key:
                self.answer(200, bucket.listed(prefix))
            elif key in bucket.objects:
                body = bucket.objects[key]
                for act in bucket.after if self.command == "GET" else ():
                    act(key)
                self.answer(200, body)
            else:
                self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>Not there</Message></Error>")

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{_etag(body)}"')
            self.send_header("Last-Modified", formatdate(EPOCH, usegmt=True))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: tests read `requests`."""

    return Handler


def _etag(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()
