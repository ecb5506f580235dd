"""Makes a GPT-2 of a few KB in the layout of OpenAI's release, with a checkpoint written by TensorFlow itself.

Run with `pip install -e '.[test,tensorflow]'` as

    python -m parity_tests.tools.tensorflow_fixture

which regenerates parity_tests/fixtures/tiny_gpt2, byte for byte with the same TensorFlow: two layers of random weights,
scaled so that each matters, and a vocabulary learned from TEXT. It then reads everything back, the checkpoint with
TensorFlow and the vocabulary with tiktoken, and compares.
"""

import json
import os
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "fixtures" / "tiny_gpt2"

MERGES = 30
HPARAMS = {"n_vocab": 256 + MERGES + 1, "n_ctx": 16, "n_embd": 12, "n_head": 2, "n_layer": 2}

TEXT = """The painter had put his brushes away long before the winter came, and he said that he had no need of them.
Whether the light in that room was better than the light on the hill, nobody at the house could have said."""


def weights(rng):
    """The variables of OpenAI's graph: name -> float32 array. Layers are convolutions of width 1: w is (1, in, out)."""
    V, T, C, L = (HPARAMS[key] for key in ("n_vocab", "n_ctx", "n_embd", "n_layer"))

    def normal(*shape, mean=0.0):
        return rng.normal(mean, 0.3, shape).astype(np.float32)

    def norm(scope):
        return {f"{scope}/g": normal(C, mean=1.0), f"{scope}/b": normal(C)}

    def conv1d(scope, inputs, outputs):
        return {f"{scope}/w": normal(1, inputs, outputs), f"{scope}/b": normal(outputs)}

    model = {"wpe": normal(T, C), "wte": normal(V, C)}
    for i in range(L):
        model |= norm(f"h{i}/ln_1") | conv1d(f"h{i}/attn/c_attn", C, 3 * C) | conv1d(f"h{i}/attn/c_proj", C, C)
        model |= norm(f"h{i}/ln_2") | conv1d(f"h{i}/mlp/c_fc", C, 4 * C) | conv1d(f"h{i}/mlp/c_proj", 4 * C, C)
    return {f"model/{name}": array for name, array in (model | norm("ln_f")).items()}


def write_checkpoint(folder, arrays):
    """Save the arrays as variables of these names with the API of OpenAI's release: a graph, a session, a Saver."""
    import tensorflow as tf

    v1 = tf.compat.v1
    prefix = str(folder / "model.ckpt")
    with tf.Graph().as_default(), v1.Session() as session:
        for name, array in arrays.items():
            v1.get_variable(name, initializer=array, use_resource=False)
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver(write_version=v1.train.SaverDef.V2, save_relative_paths=True)
        saver.save(session, prefix, write_meta_graph=False)
    reader = tf.train.load_checkpoint(prefix)
    assert set(reader.get_variable_to_shape_map()) == set(arrays)
    for name, array in arrays.items():
        again = reader.get_tensor(name)
        assert again.dtype == array.dtype, name
        assert np.array_equal(again, array), name


def byte_letters():
    """Byte -> its letter in the vocabulary's files, in the order of GPT-2's first 256 tokens.

    A byte that is printable in Latin-1 is its own letter; the others, in order, get the letters from U+0100.
    """
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printed]
    return {b: chr(b) for b in printed} | {b: chr(256 + k) for k, b in enumerate(others)}


def learn_merges(text, count):
    """The pairs to merge: each time the most frequent pair of neighbours within the words of the text."""
    letters = byte_letters()
    words = [[letters[b] for b in word.encode()] for word in re.findall(r" ?\w+|\S|\s", text)]
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            for k in range(len(word) - 2, -1, -1):
                if tuple(word[k : k + 2]) == best:
                    word[k : k + 2] = ["".join(best)]
    return merges


def write_vocabulary(folder):
    """Write encoder.json and vocab.bpe: the bytes, the merges, and <|endoftext|> last."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    merges = learn_merges(TEXT, MERGES)
    tokens = [*byte_letters().values(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    bpe, encoder = folder / "vocab.bpe", folder / "encoder.json"
    bpe.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    encoder.write_text(json.dumps({token: id_ for id_, token in enumerate(tokens)}), encoding="utf-8")
    ranks = data_gym_to_mergeable_bpe_ranks(str(bpe), str(encoder))
    assert len(ranks) == HPARAMS["n_vocab"] - 1


def main():
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # its start-up messages would hide errors
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "hparams.json").write_text(json.dumps(HPARAMS))
    write_vocabulary(FOLDER)
    write_checkpoint(FOLDER, weights(np.random.default_rng(1)))
    for file in sorted(FOLDER.iterdir()):
        sys.stdout.write(f"{file.stat().st_size:7,d}  {file.relative_to(FOLDER.parent)}\n")


if __name__ == "__main__":
    main()
