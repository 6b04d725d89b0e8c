"""The explorer's view as HTML: one style sheet and one script, with its data in it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

FOLDER = Path(__file__).parent
MODULE, STYLES = FOLDER / "explorer.js", FOLDER / "explorer.css"
SCRIPT = re.compile(r'<script type="module">(.*?)</script>', re.DOTALL)
MISSING = ("This part of the page needs JavaScript, which is turned off here or too old: the images, their attention "
           "before and after, the handle for θ and the map can't be shown. Everything else on the page is complete.")


def explorer_html(data_json: str) -> str:
    """Return the view as HTML that loads nothing; `data_json` is from `as_json`."""
    module = MODULE.read_text(encoding="utf-8")
    return (f"<style>\n{STYLES.read_text(encoding='utf-8')}</style>\n"
            f'<div class="itae-explorer"><p class="missing">{MISSING}</p></div>\n'
            f'<script type="module">{module}\nmount({data_json});\n</script>')


def script_hashes(page: str) -> list[str]:
    """Return the explorer's own scripts in a page, as hashes for the `script-src` of its Content-Security-Policy."""
    module = MODULE.read_text(encoding="utf-8")
    return [script_hash(script) for script in SCRIPT.findall(page) if script.startswith(module)]


def script_hash(script: str) -> str:
    """Return a script's hash for the `script-src` of a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
