"""numpy_gpt.data: texts by name or path, and windows and batches equal to those of the book's torch data loaders."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from numpy_gpt import data
from numpy_gpt.data import Loader, load_text, sliding_windows, split_text
from numpy_gpt.errors import InputError
from numpy_gpt.random.generator import Generator
from numpy_gpt.tokenizer import encode, get_encoding
from parity_tests.judge.web import Web


class TorchWindows(Dataset):
    """The book's dataset: item k is a window and the same window one token later, as tensors."""

    def __init__(self, ids, max_length, stride):
        self.ids = [int(i) for i in ids]
        self.max_length = max_length
        self.starts = range(0, len(self.ids) - max_length, stride)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, k):
        start = self.starts[k]
        window = torch.tensor(self.ids[start : start + self.max_length + 1])
        return window[:-1], window[1:]


def equal(batches, torch_batches):
    """Assert that both yield the same (x, y) pairs, the same number of times."""
    for (x, y), (want_x, want_y) in zip(batches, torch_batches, strict=True):
        assert x.dtype == y.dtype == np.int64
        np.testing.assert_array_equal(x, want_x.numpy())
        np.testing.assert_array_equal(y, want_y.numpy())
    return True


# Windows


@given(n=st.integers(2, 60), T=st.integers(1, 20), stride=st.integers(1, 25))
@example(n=9, T=4, stride=4)  # 2 windows, which use the last target
@example(n=8, T=4, stride=4)  # the second window lacks its last target
@example(n=5, T=4, stride=1)  # just enough
@example(n=4, T=4, stride=1)  # one too few
def test_windows_match_the_book(n, T, stride):
    ids = np.arange(100, 100 + n)  # all different, so a shift shows
    want = TorchWindows(ids, T, stride)
    if len(want) == 0:
        with pytest.raises(InputError):
            sliding_windows(ids, T, stride)
        return
    inputs, targets = sliding_windows(ids, T, stride)
    assert inputs.shape == targets.shape == (len(want), T)
    assert inputs.dtype == targets.dtype == np.int64
    for k, (x, y) in enumerate(want):
        assert inputs[k].tolist() == x.tolist()
        assert targets[k].tolist() == y.tolist()


def test_windows_are_int64_views():
    inputs, targets = sliding_windows(np.zeros(1_000_000, np.int32), 100_000, 1)  # copies would take 1.3 TB
    assert inputs.shape == targets.shape == (900_000, 100_000)
    assert inputs.dtype == targets.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        inputs[0, 0] = 1


def test_text_shorter_than_one_window_is_refused():
    with pytest.raises(InputError) as error:
        sliding_windows(np.arange(256), 256, 256)
    assert str(error.value) == (
        "the text is too short: it has 256 tokens, and one window takes 257 "
        "(a context of 256 and the next token): choose a shorter --context-length or a longer text"
    )
    with pytest.raises(InputError, match="it has 0 tokens"):
        sliding_windows(np.array([], np.int64), 1, 1)


@pytest.mark.parametrize(("T", "stride", "name"), [(0, 1, "max_length"), (-1, 1, "max_length"), (1, 0, "stride")])
def test_lengths_below_one_are_refused(T, stride, name):
    with pytest.raises(InputError, match=f"^{name} must be at least 1, not {min(T, stride)}$"):
        sliding_windows(np.arange(10), T, stride)


# Batches


@st.composite
def loaders(draw):
    """(ids, T, stride, B, drop_last, order) of an epoch; the order may permute and repeat windows."""
    T, stride = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    windows = draw(st.integers(1, 12))
    B, drop_last = draw(st.integers(1, 14)), draw(st.booleans())
    n = (windows - 1) * stride + T + 1 + draw(st.integers(0, stride - 1))
    ids = np.array(draw(st.lists(st.integers(0, 50256), min_size=n, max_size=n)))
    order = draw(st.none() | st.permutations(range(windows)) | st.lists(st.integers(0, windows - 1), min_size=windows))
    return ids, T, stride, B, drop_last, order and order[:windows]


@given(case=loaders(), data=st.data())
@example(case=(np.arange(11), 1, 1, 4, False, None), data=None)  # 10 windows: 4, 4, 2
@example(case=(np.arange(11), 1, 1, 4, True, None), data=None)
@example(case=(np.arange(11), 1, 1, 5, False, None), data=None)  # 5, 5
@example(case=(np.arange(4), 1, 1, 4, True, None), data=None)  # 3 windows, no batch
def test_batches_match_torchs_dataloader(case, data):
    ids, T, stride, B, drop_last, order = case
    windows = TorchWindows(ids, T, stride)
    torch_loader = DataLoader(windows, batch_size=B, sampler=order or range(len(windows)), drop_last=drop_last)
    asked = []

    def begin_epoch(count):
        asked.append(count)
        return None if order is None else np.array(order)

    inputs, targets = sliding_windows(ids, T, stride)
    if len(torch_loader) == 0:
        with pytest.raises(InputError):
            Loader(inputs, targets, B, drop_last, begin_epoch)
        return
    loader = Loader(inputs, targets, B, drop_last, begin_epoch)
    assert len(loader) == len(torch_loader)
    assert loader.tokens == sum(x.numel() for x, _ in torch_loader)
    assert asked == []
    for epoch in (1, 2):
        assert equal(loader, torch_loader)
        assert asked == [len(windows)] * epoch
    start = data.draw(st.integers(0, len(loader))) if data else 1
    assert equal(loader.batches(begin_epoch(0), start), list(torch_loader)[start:])


def test_shuffled_epochs_match_torchs_for_the_same_seed():
    """Two epochs on one stream: numpy_gpt's Generator gives the same orders as torch's shuffling."""
    ids = np.arange(1000)
    torch.manual_seed(123)
    torch_loader = DataLoader(TorchWindows(ids, 8, 8), batch_size=3, shuffle=True, drop_last=True)
    loader = Loader(*sliding_windows(ids, 8, 8), 3, True, Generator(123).loader_order)
    first, second = list(loader), list(loader)
    assert equal(first, torch_loader)
    assert equal(second, torch_loader)
    assert not np.array_equal(first[0][0], second[0][0])


def test_order_is_drawn_when_iteration_begins():
    asked = []
    loader = Loader(*sliding_windows(np.arange(10), 2, 2), 2, False, asked.append)
    batches = iter(loader)
    assert asked == [4]
    assert next(batches)[0].tolist() == [[0, 1], [2, 3]]
    assert asked == [4]


def test_default_order_is_file_order():
    x, y = next(iter(Loader(*sliding_windows(np.arange(10), 2, 2), 2, True)))
    assert (x.tolist(), y.tolist()) == ([[0, 1], [2, 3]], [[1, 2], [3, 4]])


def test_batches_are_copies():
    ids = np.arange(10)
    for order in (None, np.array([2, 0, 1, 3])):
        loader = Loader(*sliding_windows(ids, 2, 2), 2, True)
        for x, y in loader.batches(order):
            assert x.flags.c_contiguous
            assert y.flags.c_contiguous
            x[:] = y[:] = -1
    assert ids.tolist() == list(range(10))


def test_loader_without_a_batch_is_refused():
    inputs, targets = sliding_windows(np.arange(7), 2, 2)
    assert len(Loader(inputs, targets, 4, False)) == 1
    with pytest.raises(InputError) as error:
        Loader(inputs, targets, 4, True)
    assert str(error.value) == (
        "the text gives no batch: it has 3 windows, and a batch takes 4: "
        "choose a smaller --batch-size, a shorter --context-length or a longer text"
    )
    with pytest.raises(InputError, match="it has 0 windows"):
        Loader(inputs[:0], targets[:0], 4, False)
    with pytest.raises(InputError, match=r"^batch_size must be at least 1, not 0$"):
        Loader(inputs, targets, 0, False)
    with pytest.raises(ValueError, match=r"inputs are \(3, 2\), targets \(2, 2\)"):
        Loader(inputs, targets[1:], 2, False)


@pytest.mark.parametrize(("order", "start"), [(np.arange(4), 0), (np.zeros((3, 1), int), 0), (None, 3), (None, -1)])
def test_position_of_another_run_is_refused(order, start):
    loader = Loader(*sliding_windows(np.arange(7), 2, 2), 2, False)
    with pytest.raises(
        InputError, match=rf"^batch {start} of an order of . windows .* has 3 windows in 2 batches: resume"
    ):
        loader.batches(order, start)


# Texts


@given(text=st.text(), ratio=st.sampled_from([0, 0.1, 0.5, 0.9, 1 / 3, 1]))
def test_split_text_rejoins(text, ratio):
    train, val = split_text(text, ratio)
    assert train + val == text
    assert len(train) == int(ratio * len(text))
    assert split_text(text) == split_text(text, 0.9)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_share_outside_0_to_1_is_refused(ratio):
    with pytest.raises(InputError, match=f"^the training share of the text must be from 0 to 1, not {ratio}$"):
        split_text("text", ratio)


def test_python_manual_is_complete():
    from pydoc_data.topics import topics

    text = load_text("python-manual")
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert text.startswith(topics[min(topics)] + "\n")
    assert text.endswith("\n" + topics[max(topics)])
    assert len(text) > 400_000  # true for Python 3.11 to 3.14; no release promises a length


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1))
@example(text="naïve 🙂\n€")
def test_file_is_read_as_utf8(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text"
    path.write_bytes(text.encode())
    assert load_text(str(path)) == text


def test_newlines_are_normalised(tmp_path):
    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n")
    assert load_text(str(tmp_path / "text")) == "a\nb\nc\n"


def test_corpus_name_with_a_folder_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python-manual").write_text("mine")
    assert load_text("./python-manual") == "mine"
    assert load_text("python-manual") != "mine"


BAD_FILES = {
    "empty": (b"", "{} is empty: give a text"),
    "NUL": (b"text\0text", "{} is binary (it contains NUL bytes): give plain UTF-8 text"),
    "latin-1": (b"na\xefve", "{} is not UTF-8 text (byte 0xef at offset 2): convert it to UTF-8"),
    "UTF-16": (b"\xff\xfea\0", "{} is not UTF-8 text (byte 0xff at offset 0): convert it to UTF-8"),
    "cut": (b"a\xe2\x82", "{} is not UTF-8 text (byte 0xe2 at offset 1): convert it to UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_non_text_file_is_refused(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_text(str(path))
    assert str(error.value) == message.format(path)


@pytest.mark.parametrize("name", ["", "no-such-text", "verdict", os.path.join(__file__, "below")])
def test_unknown_text_name_is_refused(name):
    with pytest.raises(InputError) as error:
        load_text(name)
    assert str(error.value) == (
        f"{name!r} is neither a known text nor a file: "
        "choose python-manual or the-verdict, or give the path of a file of UTF-8 text"
    )


def test_folder_is_refused(tmp_path):
    with pytest.raises(InputError) as error:
        load_text(str(tmp_path))
    assert str(error.value) == f"{tmp_path} is a folder: give one file of UTF-8 text"


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    def locked(name, *_, **__):  # the tests may run as root, to whom permissions do not apply
        raise PermissionError(13, "Permission denied", name)

    path = tmp_path / "text"
    path.touch()
    monkeypatch.setattr("builtins.open", locked)
    with pytest.raises(InputError) as error:
        load_text(str(path))
    monkeypatch.undo()
    assert str(error.value) == (
        f"{path} may not be read by this user (Permission denied): change its permissions or its folder's"
    )


# The story

TALE = "Once upon a time — a tale in place of the story.\n".encode()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that expects TALE as the-verdict, has no copy of it, and caches in tmp_path/cache/numpy-gpt."""
    monkeypatch.setattr(data, "VERDICT_SHA256", hashlib.sha256(TALE).hexdigest())
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("NUMPY_GPT_DATA", raising=False)
    with Web(monkeypatch) as web:
        yield web


def put(folder, content=TALE):
    folder.mkdir(parents=True)
    (folder / "the-verdict.txt").write_bytes(content)


def test_story_comes_from_the_data_folder(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMPY_GPT_DATA", str(tmp_path / "data"))
    put(tmp_path / "data")
    put(tmp_path / "cache" / "numpy-gpt", TALE[1:])
    assert load_text("the-verdict") == TALE.decode()
    assert machine.asked == []


@pytest.mark.parametrize("in_data_folder", [None, TALE[:-1]], ids=["missing", "damaged"])
def test_story_falls_back_to_the_cache(machine, tmp_path, monkeypatch, in_data_folder):
    if in_data_folder:
        monkeypatch.setenv("NUMPY_GPT_DATA", str(tmp_path / "data"))
        put(tmp_path / "data", in_data_folder)
    put(tmp_path / "cache" / "numpy-gpt")
    assert load_text("the-verdict") == TALE.decode()
    assert machine.asked == []


def test_story_is_downloaded_once(machine, tmp_path):
    address = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
    machine.pages[address] = TALE
    assert load_text("the-verdict") == load_text("the-verdict") == TALE.decode()
    assert machine.asked == [address]
    assert [path.name for path in (tmp_path / "cache" / "numpy-gpt").iterdir()] == ["the-verdict.txt"]


def test_missing_story_error_names_all_places(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMPY_GPT_DATA", str(tmp_path / "data"))
    put(tmp_path / "data", TALE[:-1])
    machine.pages[data.VERDICT_URL] = TALE[1:]
    with pytest.raises(InputError) as error:
        load_text("the-verdict")
    cached = tmp_path / "cache" / "numpy-gpt" / "the-verdict.txt"
    assert str(error.value) == (
        f"the-verdict.txt was not found: {tmp_path / 'data' / 'the-verdict.txt'} is damaged or another file "
        f"(its SHA-256 is not {hashlib.sha256(TALE).hexdigest()[:8]}…); {cached} does not exist; "
        f"{data.VERDICT_URL} serves another file than expected (its SHA-256 differs): "
        "connect to the network once, put the file into $NUMPY_GPT_DATA, or choose the text python-manual"
    )
    assert not cached.exists()


@pytest.fixture
def story():
    """The real story, which is not in the repository."""
    folder = os.environ.get("NUMPY_GPT_DATA")
    if not folder or not Path(folder, "the-verdict.txt").exists():
        pytest.skip("the story is missing: set NUMPY_GPT_DATA to the folder that holds the-verdict.txt")
    return load_text("the-verdict")


def test_story_matches_the_books_figures(story):
    encoding = get_encoding("gpt2")
    assert len(story) == 20479
    assert len(encode(encoding, story)) == 5145
    train, val = (sliding_windows(encode(encoding, part), 256, 256) for part in split_text(story))
    train_loader, val_loader = Loader(*train, 2, drop_last=True), Loader(*val, 2, drop_last=False)
    assert [x.shape for x, _ in train_loader] == [(2, 256)] * 9
    assert [y.shape for _, y in val_loader] == [(2, 256)]
    assert (len(train_loader), len(val_loader)) == (9, 1)
    assert (train_loader.tokens, val_loader.tokens) == (4608, 512)
