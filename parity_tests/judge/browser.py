"""The page of numpy-gpt explore in Chromium: a small model's page, served from a thread, and a browser to read it."""

import shutil
import threading
from contextlib import contextmanager

from numpy_gpt import GPT, Generator, GPTConfig, trace
from numpy_gpt.tokenizer import get_encoding

TEXT = "Every effort moves you"
CONFIG = {"vocab_size": 257, "context_length": 40, "emb_dim": 12, "n_heads": 3, "n_layers": 2, "drop_rate": 0.2}


def page_of(text=TEXT, dtype="float32", dropout=False, kind=None, checkpoint="here", **config):
    """The page of a small model with weights of all sizes; dropout: its pass draws masks. kind: a subclass of Page."""
    from numpy_gpt.explore.payload import Page, flat_caches, read_text

    model = GPT(GPTConfig(**CONFIG | config), seed=1, dtype=dtype)
    noise = Generator(2)
    for array in model.params.values():
        array += 0.3 * noise.normal(array.size).reshape(array.shape)
    words = get_encoding("bytes")
    page = (kind or Page)(model, words, checkpoint, read_text(words, model.config, text, None))
    if dropout:
        page.trace = trace(model, page.ids.tokens, page.ids.targets, Generator(3))
        page.caches = flat_caches(page.trace.caches)
    return page


@contextmanager
def served(page, torch=None):
    """The address of a page, served meanwhile. torch: computes PyTorch's arrays, see Pages."""
    from numpy_gpt.explore.pages import Pages
    from numpy_gpt.explore.server import listen, server

    sock, pages = listen(0), Pages(page, torch)
    made, address, _ = server(pages, sock)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield address
    finally:
        made.should_exit = True
        thread.join()
        pages.close()


@contextmanager
def chromium():
    """Chromium, the distribution's. Raises ImportError without playwright, FileNotFoundError without a browser."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise FileNotFoundError("there is no chromium: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
