"""The page of a server in headless Chromium: one browser, and pages that are held to their origin.

Chromium is the system's (`make test-page` installs Debian's), Playwright only drives it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny_qwen2"
ADAPTERS = ("bullets", "relevant", "similar", "topic", "upper")
TOPICS = ("numbers", "files", "tests")
PANELS = ("generate", "embed", "classify", "rerank", "live")
LIMIT = 30_000
"""Milliseconds after which what a test waits for will not come."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; it ends with the block."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "no Chromium on this machine; Debian's package is `chromium`"
    expect.set_options(timeout=LIMIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@contextmanager
def lorax_serve() -> Iterator[str]:
    """The address of `lorax serve` with the small Qwen2 and its adapters."""
    adapters = [word for name in ADAPTERS for word in ("--adapter", f"{name}={TINY}/adapters/{name}")]
    command = [sys.executable, "-m", "lorax_core.cli.main", "serve", TINY / "model", "--model-name", "tiny-qwen2"]
    # One thread: several that spin on a machine that others use too take many times as long.
    labels = [word for at, name in enumerate(TOPICS) for word in ("--label", f"topic:{at}={name}")]
    options = ["--port", "0", "--threads", "1", "--kv-cache-tokens", "4096", "--drain-timeout", "1"]
    with subprocess.Popen([*command, *options, *adapters, *labels], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = iter(process.stderr.readline, "")
        found = next(one for line in said if (one := re.search(r"http://[\d.:]+", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield found[0]
        finally:
            process.terminate()


class Visit:
    """A page in a context of its own, and what went wrong on it."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1280, height: int = 800, **options: Any) -> None:
        self.url, self.elsewhere, self.complaints = url, list[str](), list[str]()
        self._context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page: Page = self._context.new_page()
        self.page.on("request", self._asked)
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.elsewhere.append(request.url)

    def close(self) -> None:
        """Close it; nothing may have been asked elsewhere, and the console is empty but for refusals of the server."""
        self._context.close()
        assert self.elsewhere == []
        assert [one for one in self.complaints if not one.startswith("Failed to load resource")] == []

    def known(self) -> Visit:
        """Once it knows what the server is."""
        expect(self.page.locator("#about")).to_contain_text("adapter")
        return self

    def choose(self, panel: str) -> None:
        """A tab, by a click."""
        self.page.click(f"#tab-{panel}")

    def submit(self, panel: str, ends: str) -> None:
        """The form of a panel; its note then says so."""
        self.page.click(f"#form-{panel} [type=submit]")
        expect(self.page.locator(f"#note-{panel}")).to_contain_text(ends)

    def use_all(self) -> None:
        """Every panel, as it stands; all have results then."""
        ends = {"generate": "answers in", "embed": "vectors of", "classify": "texts in", "rerank": "documents in"}
        for panel, end in ends.items():
            self.choose(panel)
            self.submit(panel, end)
