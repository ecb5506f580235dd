"""The command explore."""

import webbrowser
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from numpy_gpt.cli.flags import ENCODING, PATH, Count
from numpy_gpt.cli.info import enough_memory
from numpy_gpt.cli.texts import as_typed, exists, fitting_encoding
from numpy_gpt.console import Report, printable
from numpy_gpt.errors import InputError, install
from numpy_gpt.weights.checkpoint import find_model, load, read_header

EXTRA = ("starlette", "uvicorn", "latex2mathml", "pygments")
"""What the page needs beyond numpy_gpt."""


@click.command("explore", short_help="Look inside a pass: every activation, gradient and number.")
@click.argument("checkpoint")  # a path, unless swapped with the text
@click.argument("text")
@click.option(
    "--targets",
    metavar="TEXT",
    help="What comes after TEXT; its first token is the last target.  [default: TEXT's own last token]",
)
@ENCODING
@click.option("--port", type=Count(1, 65535), metavar="N", help="Port of the page.  [default: a free one]")
@click.option("--no-browser", is_flag=True, help="Print the page's address without opening a browser.")
@click.option("--out", type=PATH, metavar="FILE.html", help="Write the page to a file instead, for a small model.")
def explore_command(
    checkpoint: str,
    text: str,
    targets: str | None,
    encoding: str | None,
    port: int | None,
    no_browser: bool,
    out: Path | None,
) -> None:
    """Show what CHECKPOINT makes of TEXT on a page in the browser: each tensor and its gradient, the lines that
    compute it, and the terms that each number is the sum of.

    The page is served on 127.0.0.1 until Ctrl-C, and asks the network for nothing.
    """
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise InputError(f"the page needs {', '.join(missing)}: {install('explore')}")
    from numpy_gpt.explore.file import check_fits, check_new_file, write_page
    from numpy_gpt.explore.pages import Pages
    from numpy_gpt.explore.payload import Page, read_text
    from numpy_gpt.explore.reference import stamp_of, torch_arrays, torch_is_here
    from numpy_gpt.explore.server import Served, listen, serve

    if exists(text) and not exists(checkpoint):
        raise InputError(f"the text and the checkpoint are swapped: give {text} first, then the text")
    header = read_header(checkpoint)
    words = fitting_encoding(header, encoding)
    text, targets = as_typed(text, "text"), None if targets is None else as_typed(targets, "text of --targets")
    if out is not None:
        check_new_file(out)
        check_fits(header.config, next(iter(header.tensors.values())).dtype.itemsize)
    ids = read_text(words, header.config, text, targets)
    sock = None if out is not None else listen(port or 0)
    report = Report(required=out is None)  # with --out, the file is the result: the last line may fail
    with report.status() as progress, enough_memory(header.config, 16, "showing every activation and gradient"):
        progress("reading the model")
        file = find_model(checkpoint)
        stamp = stamp_of(file)
        model = load(checkpoint)
        progress(f"running {ids.tokens.size} tokens forward and backward")
        page = Page(model, words, str(checkpoint), ids)
        if sock is None:
            assert out is not None
            progress("writing the page")
            write_page(page, out)
        else:
            torch = partial(torch_arrays, file, stamp) if torch_is_here() else None
            pages = Pages(page, torch)
    if sock is None:
        assert out is not None
        report.line(
            f"Saved {printable(str(out))} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser, no network needed"
        )
        return

    def ready(served: Served) -> None:
        opened = not no_browser and open_browser(served.once)
        report.line(f"{'Opening' if opened else 'Open'} {served.address} in a browser; Ctrl-C stops the server")

    with sock:
        serve(pages, sock, ready)


def open_browser(address: str) -> bool:
    """Open a browser's window, if there is one; not a browser that would take over this terminal."""
    try:
        browser = webbrowser.get()
        if type(browser).__name__ in ("GenericBrowser", "Elinks"):  # w3m, lynx and the like
            return False
        return browser.open(address)
    except (webbrowser.Error, OSError, ValueError):  # ValueError: of an unusable $BROWSER
        return False
