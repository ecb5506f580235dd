"""The page of numpy-gpt explore in a real browser: terms are true, nothing else is asked for, keys and links work."""

import math
import re
from contextlib import contextmanager

import numpy as np
import pytest

from parity_tests.judge.browser import chromium, page_of, served

pytestmark = pytest.mark.browser

CELLS = 300  # of each array, or all its numbers; of the other models a fifth
MODELS = {
    "untied": {},
    "tied": {"tie_weights": True, "qkv_bias": True},
    "dropout": {"dropout": True, "qkv_bias": True},
    "float64": {"dtype": "float64"},
    "tied float64 dropout": {"dtype": "float64", "tie_weights": True, "dropout": True},
    "one token": {"text": "ab", "qkv_bias": True},
}
EXPLAIN = """async (cells) => {
    const { explain } = await import("explore/terms.js");
    const { store } = await import("explore/store.js");
    return Promise.all(cells.map(async ([name, index, gradient]) => {
        const found = await explain(store, name, index, gradient);
        const terms = found.terms.map(({ value, factors, inputs, means }) => [value, factors,
            inputs.map((i, k) => `${k < factors.length && means[k] ? `${means[k]} ` : ""}${i.gradient ? "d " : ""}`
                + `${i.name}[${i.index.join(", ")}]`)]);
        return { stored: found.stored, sum: found.sum, error: found.error, terms };
    }));
}"""
FOLLOW = """async (cells) => {
    const { explain, next, whyZero } = await import("explore/terms.js");
    const { store } = await import("explore/store.js");
    return Promise.all(cells.map(async ([name, index, gradient]) => {
        let at = { name, index, gradient }, passed = [];
        while (true) {
            passed.push(`${at.gradient ? "d " : ""}${at.name}`);
            if (passed.length > 200) return ["endless", passed];
            if (at.name === "tokens") return ["token", passed];
            const found = await explain(store, at.name, at.index, at.gradient);
            const to = next(found, at);
            if (to) { at = to; continue; }
            if (!at.gradient && at.name in store.summary.arrays.params) return ["parameter", passed];
            if (found.stored === -Infinity) return ["future", passed];
            const nothing = at.gradient && found.stored === 0 && !found.terms.length;
            return [nothing ? whyZero(store, at.name, at.index, found) : "nowhere", passed];
        }
    }));
}"""


@pytest.fixture(scope="module")
def browser():
    """Skips without a browser; in CI a skipped test is a failed one."""
    for module in ("playwright", "starlette", "uvicorn", "latex2mathml", "pygments"):
        pytest.importorskip(module)
    try:
        manager = chromium()
        made = manager.__enter__()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    try:
        yield made
    finally:
        manager.__exit__(None, None, None)


@contextmanager
def tab(browser, address, refused=None, **options):
    """A tab that has drawn the address; asserts at the end that it asked for nothing else and nothing was thrown.

    refused: the status of requests that fail as expected.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
    home, asked, wrong = address.partition("#")[0], [], []
    context.on("request", lambda request: asked.append(request.url))
    made = context.new_page()
    made.on("websocket", lambda socket: asked.append(socket.url))
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    made.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    try:
        made.goto(address)
        made.wait_for_selector("#tokens .token")
        made.errors = wrong
        yield made
        assert asked
        assert [url for url in asked if not url.startswith((home, "data:"))] == []
        assert [said for said in wrong if f"a status of {refused} " not in said] == []
    finally:
        context.close()


def show(tab, link):
    """Go to a permanent link, and wait until its number is drawn."""
    tab.evaluate("(link) => { location.hash = link; }", link)
    tab.wait_for_function(
        "(link) => location.hash === link && document.querySelector('#number .terms')?.dataset.of === link", arg=link
    )


def link(name, index, gradient):
    return f"#{'grad:' if gradient else ''}{name}/{','.join(map(str, index))}"


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request, browser):
    page = page_of(**request.param)
    with served(page) as address, tab(browser, address) as made:
        yield page.trace, made


def arrays(t):
    """(name, array, gradient?) of every value, parameter and gradient, and the loss."""
    for gradient in (False, True):
        for name, array in {**t.values, **t.params, "loss": np.asarray(t.loss)}.items():
            yield name, array, gradient


def some_cells(array, count, seed=0):
    """Random indices, each once."""
    rng = np.random.default_rng([seed, array.size])
    flat = rng.permutation(array.size)[:count]
    return [[int(i) for i in np.unravel_index(each, array.shape)] for each in flat]


def test_the_terms_on_the_page_are_pythons_and_add_up(model, request):
    """Of every value, parameter and gradient, also the loss."""
    t, made = model
    eps, count = float(np.finfo(t.logits.dtype).eps), 0
    few = CELLS if request.node.callspec.id == "untied" else CELLS // 5
    for name, array, gradient in arrays(t):
        cells = some_cells(array, few)
        if name in ("tok_emb.weight", "out_head.weight"):  # most rows are of tokens that do not occur
            cells += [[int(token), int(token) % array.shape[1]] for token in np.unique([t.tokens, t.targets])]
        found = made.evaluate(EXPLAIN, [[name, index, gradient] for index in cells])
        count += len(cells)
        for index, got in zip(cells, found, strict=True):
            what, want = f"{'d ' if gradient else ''}{name}{index}", t.explain(name, index, gradient)
            assert got["stored"] == want.stored, what
            values = [value for value, _, _ in got["terms"]]
            assert values == sorted(values, key=lambda value: -abs(value)), f"{what}: the largest first"
            size = math.fsum(map(abs, values))
            if math.isfinite(want.stored):
                assert abs(math.fsum(values) - want.stored) <= 64 * eps * size, what
                assert got["error"] <= 64, what
                assert got["sum"] == math.fsum(values), what
            assert by_name(got["terms"]) == [
                (names, pytest.approx(factors, rel=1e-13, abs=0), pytest.approx(value, rel=1e-13, abs=0))
                for names, factors, value in by_name(
                    [[e.value, list(e.factors), [*e.names, *map(str, e.inputs[len(e.factors) :])]] for e in want.terms]
                )
            ], what
    assert count > (300 if t.tokens.size > 1 else 100)


def by_name(terms):
    """(inputs, factors, value), sorted: equal sizes may come in either order."""
    return sorted(((tuple(names), tuple(factors), value) for value, factors, names in terms), key=rounded)


def rounded(term):
    names, factors, value = term
    return names, tuple(float(f"{factor:.9g}") for factor in factors), float(f"{value:.9g}")


def test_following_the_largest_term_ends_at_a_token_or_a_parameter(model):
    t, made = model
    ends = {}
    for name, array, gradient in arrays(t):
        cells = some_cells(array, 12, seed=1)
        for index, (end, passed) in zip(
            cells, made.evaluate(FOLLOW, [[name, index, gradient] for index in cells]), strict=True
        ):
            what = f"{'d ' if gradient else ''}{name}{index}: {end} after {' > '.join(passed)}"
            ends[end] = ends.get(end, 0) + 1
            if end in ("token", "parameter"):
                assert not gradient or "d loss" in passed, what  # a gradient comes from the loss
                continue
            # otherwise the number itself is one that nothing made, and the page says why
            assert end not in ("endless", "nowhere", None), what
            assert end != "future" or passed[-1].endswith("att.scores"), what
    assert ends["parameter"] > 100


def test_every_link_shows_its_number_and_terms_that_add_up(browser):
    """As drawn: read from the table after "show all", one cell of every array."""
    page = page_of()
    t = page.trace
    with served(page) as address, tab(browser, address) as made:
        for name, array, gradient in arrays(t):
            [index] = some_cells(array, 1, seed=2)
            show(made, link(name, index, gradient))
            want = t.explain(name, index, gradient)
            shown = made.locator("#number .pair .explained dd").first.inner_text()
            assert np.float32(shown) == np.float32(want.stored), name
            assert (
                made.locator("#number .index input").evaluate_all("(all) => all.map((x) => Number(x.value))") == index
            )
            more = made.locator("#number .more button")
            if more.count():
                more.click()
            values = made.locator("#number .product .num").evaluate_all("(all) => all.map((x) => Number(x.title))")
            if not values:
                assert len(want.terms) == 0 or not want.terms[0].inputs, name
                continue
            assert len(values) == len(want.terms), name
            size = math.fsum(map(abs, values))
            if math.isfinite(want.stored):
                assert abs(math.fsum(values) - want.stored) <= 64 * float(np.finfo("f4").eps) * size, name


def test_a_permanent_link_opens_the_right_number_at_once(browser):
    page = page_of()
    with served(page) as address, tab(browser, address + "#grad:trf_blocks.1.att.v/0,2,3,1") as made:
        made.wait_for_selector("#number .account")
        assert (
            np.float32(made.locator("#number .explained dd").first.inner_text())
            == page.trace.grads["trf_blocks.1.att.v"][0, 2, 3, 1]
        )
        made.go_back()
        made.go_forward()
        made.wait_for_function("() => document.querySelector('#number .terms')?.dataset.of === location.hash")


def test_clicking_a_factor_goes_there_and_backspace_back(browser):
    with served(page_of()) as address, tab(browser, address) as made:
        start = "#grad:trf_blocks.0.att.k/0,1,3,2"
        show(made, start)
        to = made.locator("#number .factor a").first.get_attribute("href")
        made.locator("#number .factor a").first.click()
        made.wait_for_function("(link) => location.hash === link", arg=to)
        made.keyboard.press("Backspace")
        made.wait_for_function("(link) => location.hash === link", arg=start)
        show(made, start)
        passed = [start]
        for _ in range(60):  # f walks to the loss and from there up to a token or a parameter
            before = made.evaluate("location.hash")
            made.keyboard.press("f")
            made.wait_for_function("() => document.querySelector('#number .terms')?.dataset.of === location.hash")
            if made.evaluate("location.hash") == before:
                break
            passed.append(made.evaluate("location.hash"))
        assert "#grad:loss/" in passed
        assert "#loss/" in passed
        assert len(passed) < 60
        name = re.match(r"#(.*)/", passed[-1])[1]
        assert name.endswith((".weight", ".bias", ".scale", ".shift")) or name == "tok_emb"


def test_the_keyboard_alone_reaches_a_number_from_the_map(browser):
    with served(page_of()) as address, tab(browser, address) as made:
        for _ in range(4):
            made.keyboard.press("ArrowRight")
        made.wait_for_function("() => /^#map\\/\\d+$/.test(location.hash)")
        made.keyboard.press("Enter")
        made.wait_for_function("() => /^#(?!map)[^/]+$/.test(location.hash)")
        made.wait_for_selector("#view .heat canvas")
        made.keyboard.press("ArrowDown")
        made.keyboard.press("ArrowRight")
        made.keyboard.press("Enter")
        made.wait_for_function("() => /^#(?!map)[^/]+\\/[\\d,]+$/.test(location.hash)")
        made.wait_for_selector("#number .account")
        before = made.evaluate("location.hash")
        made.keyboard.press("i")
        made.keyboard.press("ArrowUp")
        made.wait_for_function("(before) => location.hash !== before", arg=before)
        assert made.evaluate("document.activeElement.closest('.index') !== null")


def test_a_typed_index_and_a_wrong_one(browser):
    with served(page_of()) as address, tab(browser, address) as made:
        show(made, "#trf_blocks.0.norm1/0,2,3")
        field = made.locator("#number .index input").nth(2)
        field.fill("11")
        field.press("Enter")
        made.wait_for_function("() => location.hash === '#trf_blocks.0.norm1/0,2,11'")
        field = made.locator("#number .index input").nth(2)
        field.fill("12")
        field.press("Enter")
        assert made.evaluate("location.hash") == "#trf_blocks.0.norm1/0,2,11"
        made.evaluate("location.hash = '#trf_blocks.0.norm1/0,2,99'")
        made.wait_for_function("() => document.querySelector('#view').textContent.includes('shape')")


def test_a_nudge_and_an_ablation(browser):
    page = page_of()
    with served(page) as address, tab(browser, address) as made:
        name, index = "trf_blocks.0.att.W_value.weight", [3, 4]
        show(made, link(name, index, True))
        made.locator("#number .nudge form button").click()
        made.wait_for_selector("#number .nudge dt:has-text('ratio')")
        texts = made.locator("#number .nudge dd").all_inner_texts()
        assert float(texts[3]) == pytest.approx(1, abs=0.05)
        assert float(texts[2]) == pytest.approx(page.trace.grads[name][3, 4] * 0.001, rel=1e-4)
        show(made, "#trf_blocks.1.att.heads/0,3,5")
        for button in range(made.locator("#number .ablate .choices button").count()):
            with made.expect_response("**/ablate?*"):
                made.locator("#number .ablate .choices button").nth(button).click()
        made.wait_for_timeout(200)
        base, loss = re.findall(r"[\d.]+", made.locator("#number .ablate .says").inner_text())[:2]
        want = page.ablate({"trf_blocks.1.att.heads": [(..., slice(4, 8))]})
        assert float(loss) == pytest.approx(want["loss"], rel=1e-4)
        assert float(base) == pytest.approx(float(page.trace.loss), rel=1e-4)


@pytest.mark.parametrize(
    ("route", "sentence"),
    [
        ("#grad:trf_blocks.0.att.scores/0,1,2,5", "future"),
        ("#grad:trf_blocks.0.att.scores/0,1,0,0", "one key only"),
        ("#grad:tok_emb.weight/0,3", "does not occur"),
        ("#grad:trf_blocks.0.att.W_key.bias/3", "softmax ignores"),
        ("#grad:pos_emb.weight/39,0", "text ends"),
        ("#grad:trf_blocks.0.att.q/0,1,0,0", "one key only"),
    ],
)
def test_a_zero_says_why(browser, zeros, route, sentence):
    show(zeros, route)
    assert abs(float(zeros.locator("#number .explained dd").first.inner_text())) < 1e-6  # the key bias's: of rounding
    assert sentence in zeros.locator("#number .why").inner_text()


@pytest.fixture(scope="module")
def zeros(browser):
    with served(page_of(qkv_bias=True)) as address, tab(browser, address) as made:
        yield made


def test_a_repeated_tokens_gradient_names_its_positions(browser):
    with served(page_of(text="abcabca")) as address, tab(browser, address) as made:
        show(made, f"#grad:tok_emb.weight/{ord('b')},2")
        assert re.search("positions 1, 4: their gradients add up", made.locator("#number .added").inner_text())


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("where each head looks", "#number .looks tbody tr"),
        ("where the gradient of a token's key comes from", "#view .pulls tbody tr"),
        ("a weight's gradient", "#number .term-table tbody tr"),
        ("a repeated token's gradients", "#number .added"),
    ],
)
def test_the_first_links_show_their_answer_at_once(browser, words, answer):
    with served(page_of(text="abcabca")) as address, tab(browser, address) as made:
        made.locator(".places a", has_text=words).click()
        made.wait_for_selector(answer)
        top = made.locator(answer).first.bounding_box()
        assert 0 < top["y"] < 780, top


def test_adamws_step_shows_the_digits_that_change(browser):
    with served(page_of()) as address, tab(browser, address) as made:
        show(made, "#trf_blocks.0.att.W_value.weight/3,4")
        for lr in ("0.0004", "1e-7"):
            made.locator("#number .update input").fill(lr)
            before, after = made.locator("#number .update dd").last.inner_text().replace("−", "-").split(" → ")
            assert 0 < abs(float(before) - float(after)) < 2.1 * float(lr)


def test_a_row_of_the_values_weight_has_one_name(browser):
    with served(page_of()) as address, tab(browser, address) as made:
        show(made, "#trf_blocks.0.att.W_value.weight/5,4")
        name = made.locator("#number .cell").inner_text()
        assert name == "output 5 (head 1) · input 4"
        made.locator("#view canvas").first.press("ArrowUp")
        assert made.locator("#view .readout .where").inner_text() == "output 4 (head 1) · input 4"


def test_choosing_a_token_moves_nothing(browser):
    with served(page_of(text="abcabca" * 4)) as address, tab(browser, address) as made:
        place = made.locator("#view").bounding_box()
        made.keyboard.press(".")
        made.wait_for_selector(".token[aria-selected='true']")
        assert made.locator("#view").bounding_box()["y"] == place["y"]


def test_the_skip_link_leads_to_the_view(browser):
    with served(page_of()) as address, tab(browser, f"{address}#logits") as made:
        made.wait_for_selector("#view canvas")
        made.keyboard.press("Tab")
        assert made.evaluate("document.activeElement.className") == "skip"
        made.keyboard.press("Enter")
        assert made.evaluate("document.activeElement.id") == "view"
        assert made.evaluate("location.hash") == "#logits"


def hold_back(tab, pattern):
    """The list of requests that wait, from now on, to be continued or answered."""
    held = []
    tab.route(pattern, lambda route: held.append(route))
    return held


def test_leaving_a_heat_map_by_a_key_throws_nothing(browser):
    with served(page_of()) as address, tab(browser, f"{address}#trf_blocks.1.att.scores") as made:
        for leave in ("m", "Escape"):
            made.evaluate("location.hash = '#trf_blocks.1.att.scores'")
            made.locator("#view .heat canvas").first.click(position={"x": 100, "y": 150})
            made.keyboard.press("ArrowUp")
            made.keyboard.press(leave)
            if leave == "m":
                made.wait_for_selector("#view .map")
            made.wait_for_timeout(200)  # the blurred canvas's handlers
            assert made.errors == []


def test_the_shares_of_a_keys_gradient_add_up(browser):
    """Each is the part's component along the gradient: of key 3, in all heads, by NumPy."""
    page, block = page_of(text="abcdefghijklmnop"), "trf_blocks.1.att."
    t = page.trace
    with served(page) as address, tab(browser, f"{address}#grad:{block}k") as made:
        made.wait_for_selector("#view .pulls")
        rows = made.locator("#view .pulls tbody tr").all_inner_texts()
        share = lambda text: float(re.search(r"(−?[\d.]+) %", text)[1].replace("−", "-")) / 100  # noqa: E731
        assert sum(map(share, rows)) == pytest.approx(1, abs=0.006)
        g = t.grads[f"{block}k"][0, :, 3].astype(float)
        parts = t.grads[f"{block}scores"][0, :, :, 3, None] * t.values[f"{block}q"][0] / math.sqrt(4)  # (NH, T, HS)
        want = (parts * g[:, None]).sum(axis=(0, 2)) / (g**2).sum()
        assert want.sum() == pytest.approx(1, rel=1e-4)
        for row in rows[:-1]:
            assert share(row) == pytest.approx(want[int(row.split()[0])], abs=6e-4), row
        assert "others" in rows[-1]


def test_the_loss_is_followed_to_its_worst_token(browser):
    page = page_of()
    with served(page) as address, tab(browser, address) as made:
        show(made, "#loss/")
        losses = page.summary(True, False)["tokenLosses"]
        worst = max(range(len(losses)), key=losses.__getitem__)
        made.keyboard.press("f")
        made.wait_for_function("() => location.hash.startsWith('#logits/')")
        assert made.evaluate("location.hash") == f"#logits/0,{worst},{page.ids.targets[0, worst]}"


def test_a_step_backward_names_what_it_kept(browser):
    page = page_of()
    at = next(
        i for i, each in enumerate(page.summary(True, False)["operations"]) if each["output"].endswith("1.att.heads")
    )
    steps = 2 * len(page.summary(True, False)["operations"])
    with served(page) as address, tab(browser, f"{address}#map/{steps - 1 - at}") as made:
        lines = made.locator("#view .operation .io tbody tr").all_inner_texts()
        kept = [line for line in lines if "kept from the forward pass" in line]
        assert [re.search(r"att\.\w+", line)[0] for line in kept] == ["att.probs", "att.v"]
        assert made.locator("#view .node.now").count() == 2


def test_a_view_that_was_left_is_not_drawn(browser):
    """The arrays arrive after the reader has gone back to the map; then one request fails."""
    with served(page_of()) as address, tab(browser, address, refused=409) as made:
        for name, finish in (
            ("ff.act", lambda route: route.continue_()),
            ("ff.pre", lambda route: route.fulfill(status=409, json={"error": "gone"})),
        ):
            held = hold_back(made, "**/array/**")
            made.evaluate(f"location.hash = '#trf_blocks.1.{name}'")
            made.wait_for_function("() => document.body.dataset.view === 'tensor'")
            made.wait_for_timeout(200)
            made.keyboard.press("m")
            made.wait_for_selector("#view .map")
            assert held
            for route in held:
                finish(route)
            made.unroute("**/array/**")
            made.wait_for_timeout(500)
            assert made.locator("#view .map").count() == 1
            assert made.locator("#view .tensor, #view h1:has-text('cannot be shown')").count() == 0


def test_adamws_step_is_compared_with_the_same_kind_of_loss(browser):
    """A float32 loss less a float64 one would hide a small step."""
    page = page_of()
    with served(page) as address, tab(browser, f"{address}#grad:trf_blocks.0.att.W_value.weight") as made:
        made.locator("#view .adamw input").fill("1e-9")
        made.locator("#view .adamw form button").click()
        made.wait_for_selector("#view .adamw table")
        want = page.updated(1e-9)
        said = made.locator("#view .adamw p b + b").locator("xpath=..").inner_text()
        assert float(re.search(r"\(([-+][\d.e-]+)\)", said)[1]) == pytest.approx(want["loss"] - want["base"], rel=1e-2)


def test_the_update_is_of_the_rate_in_its_title(browser):
    """Also after a step with another rate, until Update is shown again."""
    page, name = page_of(), "trf_blocks.0.att.W_value.weight"
    w, g = page.trace.params[name][1, 0], page.trace.grads[name][1, 0]
    with served(page) as address, tab(browser, f"{address}#{name}") as made:
        made.wait_for_selector("#view canvas")
        made.keyboard.press("u")
        for again in (False, True):
            made.wait_for_selector("#view .figure-head:has-text('lr')")
            if again:
                made.locator("#view .adamw input").fill("0.1")
                made.locator("#view .adamw form button").click()
                made.wait_for_selector("#view .adamw table")
                made.locator("#view canvas").first.press("u")
                made.wait_for_selector("#view .figure-head:has-text('lr 0.1')")
            made.locator("#view canvas").first.press("ArrowDown")
            lr = float(made.locator("#view .figure-head").inner_text().split("lr ")[1].split()[0])
            assert lr == (0.1 if again else 4e-4)
            shown = float(made.locator("#view .readout b").inner_text().split()[-1])
            assert shown == pytest.approx(-lr * (g / (abs(g) + 1e-8) + 0.1 * w), rel=1e-4)


@pytest.fixture(scope="module")
def large(browser):
    """A pass whose arrays exceed what is fetched at once: 4 MiB, and 16 for the second layer of feed-forward."""
    page = page_of("abcdefgh" * 128, context_length=1024, emb_dim=1032, n_heads=3, n_layers=1)
    with served(page) as address, tab(browser, address) as made:
        yield page, made


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["att.q", "att.v", "ff.pre", "resid_mid", "ff.layers.0.weight"])
def test_a_large_heat_map_shows_the_arrays_numbers(large, name, gradient):
    page, made = large
    array = (page.trace.grads if gradient else page.trace.values | page.trace.params)[f"trf_blocks.0.{name}"]
    assert array.nbytes > 4 << 20
    made.evaluate(f"location.hash = '#{'grad:' if gradient else ''}trf_blocks.0.{name}'")
    made.wait_for_function("(name) => document.querySelector('#view h1')?.innerText.startsWith(name)", arg=name)
    kind = "Gradient of the loss" if gradient else "Value"
    made.wait_for_selector(f"#view .figure-head b:text-is('{kind}')")
    canvas = made.locator("#view .tensor .heat canvas").first
    matrix = (
        array[0].swapaxes(0, 1).reshape(len(array[0, 0]), -1) if array.ndim == 4 else array.reshape(-1, array.shape[-1])
    )
    r = c = 0
    for key in ("ArrowDown", "PageDown", "Shift+ArrowRight", "End"):
        canvas.press(key)
        made.wait_for_timeout(300)
        shown = made.locator("#view .readout b").inner_text().split()[-1]
        where = made.locator("#view .readout .where").inner_text()
        r, c = cell_of(where, array.ndim, matrix.shape[1] // 3)
        assert float(shown) == pytest.approx(float(matrix[r, c]), rel=1e-5), where
    assert (r, c) == (r, matrix.shape[1] - 1)
    assert r > 1


def cell_of(where, ndim, head_size):
    """Row and column of a cell's words: "head 2 · token 5 “x” · feature 3"."""
    found = {kind: int(i) for kind, i in re.findall(r"(head|token|feature|output|input) (\d+)", where)}
    row = found.get("token", found.get("output"))
    return row, found.get("head", 0) * head_size * (ndim == 4) + found.get("feature", found.get("input"))


def test_a_pass_without_finite_numbers_is_shown(browser):
    page = page_of()
    for array in page.model.params.values():
        array *= np.float32(3e37)
    page = type(page)(page.model, page.encoding, "here", page.ids)
    assert np.isnan(page.trace.loss)
    with served(page) as address, tab(browser, address) as made:
        made.wait_for_selector("#view .map")
        assert "nan" in made.locator("#header .loss").inner_text()
        for name in ("trf_blocks.0.att.probs", "grad:trf_blocks.1.att.scores", "logits", "loss/", "final_norm"):
            made.evaluate(f"location.hash = '#{name}'")
            made.wait_for_function("(name) => document.querySelector('#view h1')?.innerText.length > 0", arg=name)
            made.wait_for_timeout(200)
            assert "cannot be shown" not in made.locator("#view").inner_text()
        show(made, "#grad:trf_blocks.0.norm1/0,3,4")
        assert "0 eps" not in made.locator("#number .account").inner_text()
        assert made.locator("#number .error:visible").count() == 0


def test_another_text_is_run_and_what_follows_is_kept(browser):
    page = page_of()
    with served(page) as address, tab(browser, f"{address}#trf_blocks.0.att.q", refused=400) as made:
        made.fill("#text", "abcab")
        made.fill("#following", "xyz")
        made.press("#text", "Enter")
        made.wait_for_function("() => document.querySelectorAll('.token').length === 5")
        assert made.input_value("#following") == "xyz"
        assert made.locator(".token-target").last.inner_text() == "x"
        made.fill("#text", "")
        made.press("#text", "Enter")
        made.wait_for_selector(".text-form .error:visible")
        made.fill("#following", "q")
        assert made.locator(".text-form .error:visible").count() == 0
        made.press("#following", "Escape")
        assert (made.input_value("#text"), made.input_value("#following")) == ("abcab", "xyz")


def test_controls_that_redraw_the_view_keep_the_focus(browser):
    with served(page_of()) as address, tab(browser, f"{address}#trf_blocks.0.att.probs") as made:
        for keep in ("value", "gradient", "both", "head-2", "listing-ops", "next", "previous"):
            made.locator(f"#view [data-keep='{keep}']").first.focus()
            made.keyboard.press("Enter")
            made.wait_for_timeout(400)
            assert made.evaluate("document.activeElement.dataset.keep") == keep


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "</script><script>window.hit = 1</script>",
    "\u202e\u2066gnp.exe\u200b",
    "\x00\x1b[31m",
    "😀🏳️‍🌈",
    "\"'`${window.hit = 1}&lt;b&gt;",
    "javascript:window.hit=1",
    "<!--",
]


def hostile_page():
    from numpy_gpt.explore.payload import Page

    class Hostile(Page):
        def piece(self, token):
            return HOSTILE[token % len(HOSTILE)]

    return page_of(text="<b>" + "".join(HOSTILE)[:30], kind=Hostile, checkpoint=HOSTILE[1])


ROUTES = ["#map", "#map/3", "#logits", "#grad:trf_blocks.0.att.probs", "#tok_emb.weight", "#loss/", "#logits/0,2,5",
          "#grad:trf_blocks.1.att.scores/0,1,5,2", "#tok_emb/0,2,5", "#<img src=x onerror=window.hit=1>",
          "#%3Cscript%3Ewindow.hit=1%3C/script%3E/1"]  # fmt: skip


def check_hostile(made):
    for route in ROUTES:
        made.evaluate("(link) => { location.hash = link; }", route)
        made.wait_for_timeout(250)
        assert made.evaluate("window.hit === undefined"), route
        assert made.locator("img, iframe, object, embed, #main script, #tokens script").count() == 0, route
        text = made.evaluate("document.body.innerText")
        assert not re.search("[\u202e\u2066\u0000\u001b]", text), route
    tokens = made.locator("#tokens .token").first.inner_text()
    assert any(part in made.locator("#tokens").inner_text() for part in ("<script>", "<img src=x")), tokens


def test_hostile_text_is_text(browser):
    with served(hostile_page()) as address, tab(browser, address) as made:
        check_hostile(made)


def test_hostile_text_is_text_in_a_file(browser, tmp_path):
    from numpy_gpt.explore.file import write_page

    write_page(hostile_page(), tmp_path / "page.html")
    with tab(browser, (tmp_path / "page.html").as_uri()) as made:
        check_hostile(made)


def test_the_page_as_a_file_explains_every_number_without_a_request(browser, tmp_path):
    from numpy_gpt.explore.file import write_page

    page, file = page_of(), tmp_path / "page.html"
    write_page(page, file)
    with tab(browser, file.as_uri(), offline=True) as made:
        for name, array, gradient in arrays(page.trace):
            cells = some_cells(array, 5, seed=4)
            for index, got in zip(
                cells, made.evaluate(EXPLAIN, [[name, index, gradient] for index in cells]), strict=True
            ):
                assert got["stored"] == page.trace.explain(name, index, gradient).stored, name
                assert got["error"] <= 64, name
        show(made, "#grad:trf_blocks.0.att.W_value.weight/3,4")
        assert "numpy-gpt explore" in made.locator("#number .nudge").inner_text()
        show(made, "#trf_blocks.0.norm1/0,2,3")
        assert "numpy-gpt explore" in made.locator("#number .ablate").inner_text()
