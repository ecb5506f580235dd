"""The page as one HTML file that opens from the disk: its modules, its style and every array inside."""

import base64
import gzip
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.explore.payload import GROUPS, Page
from numpy_gpt.explore.static_files import STATIC, index_html
from numpy_gpt.io.files import replacing, written
from numpy_gpt.io.paths import kind_of
from numpy_gpt.parameters import parameter_count
from numpy_gpt.typing import Array

LARGEST = 48_000_000
"""Bytes of arrays that a file may embed. As text they take up to a third more, which a browser reads in seconds."""

LONGEST_NAME = 200
"""Bytes of a file's name: while it is written it has a longer one, and file systems allow 255."""

SCRIPT = re.compile(r"<script.*?</script>\s*", re.DOTALL)
STYLE = re.compile(r"<link rel=\"stylesheet\"[^>]*>")


def check_fits(config: GPTConfig, itemsize: int) -> None:
    """Raise InputError, with the size, for a model whose parameters and gradients alone are too large for a file."""
    _check_bytes(2 * itemsize * parameter_count(config))


def _check_bytes(count: int) -> None:
    if count > LARGEST:
        raise InputError(
            f"the page would embed {count / 1e6:,.0f} MB of arrays; a file may hold {LARGEST / 1e6:.0f} MB: "
            "use a smaller model or a shorter text, or leave --out away to serve the page"
        )


def check_new_file(out: Path) -> None:
    """Raise InputError unless a new HTML file can be written here."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: give a name that ends in .html, or browsers show the page as text")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise InputError(f"--out {out.name:.40}…: choose a name of at most {LONGEST_NAME} bytes")
    if os.path.lexists(out):
        raise InputError(f"{out} exists already: choose another name for the page")
    if kind_of(out.parent) != "folder":
        raise InputError(f"{out.parent} is not a folder: create it first, or choose another place for the page")


def write_page(page: Page, file: Path) -> None:
    """Write the page to a new file, atomically. Raises InputError if it is too large or cannot be written."""
    html = page_html(page)
    with written(file), replacing(file) as path:
        path.write_text(html, "utf-8", newline="\n")
        check_new_file(file)  # again: another process may have made it meanwhile


def page_html(page: Page) -> str:
    """The page with all that it needs inside. Raises InputError, with the size, if the arrays are too large."""
    _check_bytes(sum(array.nbytes for group in GROUPS for array in page.group(group).values()))
    modules = {path.stem: path.read_text("utf-8") for path in sorted(STATIC.glob("*.js"))}
    addresses = {f"explore/{name}.js": _address(text) for name, text in modules.items()}
    importmap, start = json.dumps({"imports": addresses}), 'import "explore/main.js";'
    style = (STATIC / "style.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(importmap)} {_hash(start)} data:; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    summary = page.summary(served=False, torch=False)
    data = [_data("summary", "application/json", json.dumps(summary, allow_nan=False).replace("<", "\\u003c"))]
    for group in GROUPS:
        data += [_data(f"array:{group}/{n}", "text/plain", packed(a)) for n, a in page.group(group).items()]
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n'
        f'<script type="importmap">{importmap}</script>\n<script type="module">{start}</script>\n'
    )
    html = STYLE.sub("", SCRIPT.sub("", index_html()))
    html = html.replace("</head>", f"{head}</head>", 1)
    return html.replace("</body>", "\n".join([*data, "</body>"]), 1)


def packed(array: Array) -> str:
    """base64 of the gzip of an array's bytes: first all first bytes, then all second ones, which repeat more."""
    width = array.dtype.itemsize
    numbers = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    planes = numbers.view(np.uint8).reshape(-1, width).T.tobytes()
    return base64.b64encode(gzip.compress(planes, 6, mtime=0)).decode()


def _address(module: str) -> str:
    return f"data:text/javascript;base64,{base64.b64encode(module.encode()).decode()}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(name: str, kind: str, content: str) -> str:
    return f'<script type="{kind}" id="{name}">{content}</script>'
