"""Pictures of numpy-gpt explore's three zooms, and how long a reader waits for them, in Chromium."""

import statistics
import time
from functools import partial

from parity_tests.judge.browser import chromium, served

ZOOMS = {
    "map": "#map/{step}",
    "tensor": "#grad:trf_blocks.1.att.probs/0,2,9,4",
    "number": "#grad:trf_blocks.0.att.k/0,2,5,7",
}
THEMES = ("light", "dark")
LARGEST = 300_000  # bytes of a picture that the repository keeps

CLICKS = [
    *(f"#{of}trf_blocks.0.att.{name}/0,2,5,7" for of in ("", "grad:") for name in "qkv"),
    *(
        f"#{of}trf_blocks.1.{name}/0,9,3"
        for of in ("", "grad:")
        for name in ("norm1", "att.heads", "ff.act", "resid_mid")
    ),
    *(f"#{of}trf_blocks.1.att.{name}/0,1,8,4" for of in ("", "grad:") for name in ("scores", "probs")),
    *(f"#grad:trf_blocks.0.{name}/3,4" for name in ("att.W_value.weight", "ff.layers.2.weight", "att.out_proj.weight")),
    *("#final_norm/0,8,5", "#grad:final_norm/0,8,5", "#logits/0,7,101", "#grad:logits/0,7,101", "#loss/"),
]
SETTLED = 500  # milliseconds in which a reader looks at the first picture
DRAWN = "(link) => document.querySelector('#number .terms')?.dataset.of === link"


def page_of(checkpoint, text):
    """The page of a checkpoint's pass over a text."""
    from numpy_gpt.cli.texts import fitting_encoding
    from numpy_gpt.explore.payload import Page, read_text
    from numpy_gpt.weights.checkpoint import load, read_header

    header = read_header(checkpoint)
    words = fitting_encoding(header, None)
    return Page(load(checkpoint), words, str(checkpoint), read_text(words, header.config, text, None))


def gpt2_page():
    """The page of a model of GPT-2's size, not trained, over 32 tokens."""
    from numpy_gpt import GPT, GPTConfig
    from numpy_gpt.explore.payload import Page, read_text
    from numpy_gpt.tokenizer import get_encoding

    model, words = GPT(GPTConfig.gpt2("124M"), seed=1), get_encoding("gpt2")
    text = words.decode(words.encode("Every effort moves you forward. " * 8)[:33])
    return Page(model, words, "gpt2-124M", read_text(words, model.config, text, None))


def screenshots(checkpoint, text, folder):
    """Take the pictures of a checkpoint's pass over a text; yield each file's path."""
    from numpy_gpt.explore.reference import stamp_of, torch_arrays
    from numpy_gpt.weights.checkpoint import find_model

    file = find_model(checkpoint)
    page, torch = page_of(checkpoint, text), partial(torch_arrays, file, stamp_of(file))
    folder.mkdir(parents=True, exist_ok=True)
    with served(page, torch) as address, chromium() as browser:
        for theme in THEMES:
            tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=theme)
            for name, route in ZOOMS.items():
                tab.goto(address + route.format(step=11))
                tab.wait_for_selector("#tokens .token")
                if name == "number":
                    tab.wait_for_function(DRAWN, arg=route)
                    tab.wait_for_selector("#number .torch .num", timeout=120_000)
                tab.wait_for_timeout(1500)
                file = folder / f"explore-{name}-{theme}.png"
                tab.screenshot(path=file)
                if file.stat().st_size > LARGEST:
                    raise ValueError(f"{file} takes {file.stat().st_size:,} bytes, more than {LARGEST:,}")
                yield file
            tab.close()


def waits(page, file=None):
    """(what, seconds) of opening the served page, of clicks on it, and of opening the page as a file."""
    with served(page) as address, chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        yield "served: first picture", opening(tab, address)
        tab.wait_for_timeout(SETTLED)
        seconds = [click(tab, link) for link in CLICKS]
        yield f"served: a click, median of {len(seconds)}", statistics.median(seconds)
        yield f"served: a click, longest ({CLICKS[seconds.index(max(seconds))]})", max(seconds)
        tab.close()
        if file is not None:
            tab = browser.new_page(viewport={"width": 1280, "height": 800})
            yield f"file of {file.stat().st_size / 1e6:.1f} MB: first picture", opening(tab, file.as_uri())
            tab.wait_for_timeout(SETTLED)
            seconds = [click(tab, link) for link in CLICKS]
            yield "file: a click, longest", max(seconds)


def opening(tab, address):
    """Seconds until the map is drawn."""
    start = time.perf_counter()
    tab.goto(address, wait_until="commit")
    tab.wait_for_selector("#view .node canvas, #view .node .thumb")
    return time.perf_counter() - start


def click(tab, link):
    """Seconds from an address to its number's terms, measured in the page."""
    return tab.evaluate(
        """async (link) => {
            const start = performance.now();
            location.hash = link;
            const drawn = () => document.querySelector("#number .terms")?.dataset.of === link;
            while (!drawn()) await new Promise((again) => setTimeout(again, 2));
            return (performance.now() - start) / 1000;
        }""",
        link,
    )
