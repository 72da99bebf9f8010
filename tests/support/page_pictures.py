"""Pictures of the server's page: `PYTHONPATH=core:tests/support .venv/bin/python -m page_pictures docs/page.png`.

A folder in place of the file gets every panel, wide and narrow, light and dark. `make test-page` installs what it needs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from browser import PANELS, Visit, chromium, lorax_serve

SIZES = ((1280, 800), (390, 844))


def main(to: Path) -> None:
    """Use the page, and keep what is seen."""
    with lorax_serve() as url, chromium() as browser:
        for scheme in ("light", "dark"):
            for width, height in SIZES:
                seen = Visit(browser, url, width=width, height=height, color_scheme=scheme).known()
                page = seen.page
                page.get_by_label("Text to continue").check()
                page.select_option("#right", "upper")
                page.fill("#max-tokens", "112")
                seen.use_all()
                for panel in PANELS if to.is_dir() else ("generate",):
                    seen.choose(panel)
                    page.evaluate("document.activeElement.blur()")
                    path = to / f"{panel}-{scheme}-{width}.png" if to.is_dir() else to
                    page.screenshot(path=path, full_page=to.is_dir())
                seen.close()
                if not to.is_dir():
                    return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
