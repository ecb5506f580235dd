"""GPT-2 in its original format: random tensors under its own names, a forward pass over them, and folders of files.

The forward pass is OpenAI's: linear weights (in, out), query, key and value side by side. It shares no code with
numpy_gpt and does not use torch_gpt's layout.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

SIZES = {"vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_head": 2, "n_layer": 2}


def gpt2_tensors(seed=0, dtype=np.float32, tied=True, vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=2):
    """Name -> array of every tensor of a GPT-2, biases included, at a scale where all of them matter."""
    rng, C = np.random.default_rng(seed), n_embd
    shapes = {"wte.weight": (vocab_size, C), "wpe.weight": (n_positions, C)}
    for i in range(n_layer):
        block = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
        block |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
        for name, shape in block.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)} | ({} if tied else {"lm_head.weight": (vocab_size, C)})
    return {name: (0.5 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def gpt2_logits(tensors, n_head, tokens):
    """tokens (B, T) -> (B, T, V) float64, from tensors under GPT-2's names."""
    p = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tensors.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def conv1d(x, name):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    B, T = tokens.shape
    x = p["wte.weight"][torch.from_numpy(tokens)] + p["wpe.weight"][:T]
    for i in range(sum(name.endswith("attn.c_attn.weight") for name in tensors)):
        qkv = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + conv1d(y.transpose(1, 2).reshape(x.shape), f"h.{i}.attn.c_proj")
        hidden = F.gelu(conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + conv1d(hidden, f"h.{i}.mlp.c_proj")
    return (norm(x, "ln_f") @ p.get("lm_head.weight", p["wte.weight"]).T).numpy()


def huggingface_folder(folder, tensors, prefix="transformer.", shards=1, **config):
    """Write a folder as transformers does: config.json, and the tensors in one file or in `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "gpt2", **SIZES, "tie_word_embeddings": "lm_head.weight" not in tensors} | config
    (folder / "config.json").write_text(json.dumps(values))
    named = {name if name == "lm_head.weight" else prefix + name: array for name, array in tensors.items()}
    if shards == 1:
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for k in range(shards):
        part = {name: named[name] for name in list(named)[k::shards]}
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in named.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
