"""Whether a built site is whole: `python docs/check_site.py build/site`.

Decides what is wrong with a link (no such page, no such anchor), and that a page loads nothing from another origin. Knows
nothing of what built the site. Sphinx has checked the links of the sources; this reads what a browser gets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_CSS = re.compile(r"""(?:@import\s+(?:url\()?|url\()\s*["']?((?:https?:)?//[^"')\s]+)""")
_LOADS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}


class _Page(HTMLParser):
    """What one page links to, what it loads, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if "src" in given:
            self.loads.append(given["src"])
        self.loads += [one.split()[0] for one in given.get("srcset", "").split(",") if one.strip()]
        if tag == "link" and _LOADS & set(given.get("rel", "").split()):
            self.loads.append(given.get("href", ""))
        elif tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])


def problems(site: Path) -> Iterator[str]:
    """Each thing that is wrong with a built site, in one line."""
    pages = {file.resolve(): _Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages"
    for file, page in pages.items():
        name = file.relative_to(site.resolve())
        yield from (f"{name} loads {one}" for one in page.loads if urlsplit(one).netloc)
        local = [one for one in page.loads if not urlsplit(one).netloc and urlsplit(one).scheme != "data"]
        for link in (*local, *page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file():
                yield f"{name} links to {link}: no such file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links to {link}: no such anchor"
    for file in sorted(site.rglob("*.css")):
        for found in _CSS.findall(file.read_text(encoding="utf-8")):
            yield f"{file.relative_to(site)} loads {found}"


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1])))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)
