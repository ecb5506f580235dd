"""Where the page's own files are."""

from pathlib import Path

STATIC = Path(__file__).with_name("static")


def index_html() -> str:
    """The page itself."""
    return (STATIC / "index.html").read_text("utf-8")
