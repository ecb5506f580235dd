"""The pass as a list of operations on named arrays: what each reads, which parameters it uses, and what it makes."""

from typing import NamedTuple

from numpy_gpt.config import GPTConfig


class Operation(NamedTuple):
    """One operation of a pass.

    kind: "embedding", "position", "sum", "same", "layernorm", "linear", "scores", "softmax", "mix", "gelu", "residual"
    or "cross_entropy". inputs: activations, and "tokens" or "targets". parameters: a linear's weight and, if it has
    one, bias; a LayerNorm's scale and shift; a table.
    """

    kind: str
    output: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()


def operations(config: GPTConfig) -> list[Operation]:
    """Every operation of a pass, in order of computation, the loss last."""

    def linear(output: str, x: str, layer: str, bias: bool = True) -> Operation:
        return Operation("linear", output, (x,), (f"{layer}.weight", f"{layer}.bias")[: 1 + bias])

    def layernorm(output: str, x: str, layer: str) -> Operation:
        return Operation("layernorm", output, (x,), (f"{layer}.scale", f"{layer}.shift"))

    found = [
        Operation("embedding", "tok_emb", ("tokens",), ("tok_emb.weight",)),
        Operation("position", "pos_emb", (), ("pos_emb.weight",)),
        Operation("sum", "emb", ("tok_emb", "pos_emb")),
    ]
    x = "emb"
    for i in range(config.n_layers):
        b = f"trf_blocks.{i}."
        found += [
            Operation("same", f"{b}resid_pre", (x,)),
            layernorm(f"{b}norm1", f"{b}resid_pre", f"{b}norm1"),
            linear(f"{b}att.q", f"{b}norm1", f"{b}att.W_query", config.qkv_bias),
            linear(f"{b}att.k", f"{b}norm1", f"{b}att.W_key", config.qkv_bias),
            linear(f"{b}att.v", f"{b}norm1", f"{b}att.W_value", config.qkv_bias),
            Operation("scores", f"{b}att.scores", (f"{b}att.q", f"{b}att.k")),
            Operation("softmax", f"{b}att.probs", (f"{b}att.scores",)),
            Operation("mix", f"{b}att.heads", (f"{b}att.probs", f"{b}att.v")),
            linear(f"{b}att.out", f"{b}att.heads", f"{b}att.out_proj"),
            Operation("residual", f"{b}resid_mid", (f"{b}resid_pre", f"{b}att.out")),
            layernorm(f"{b}norm2", f"{b}resid_mid", f"{b}norm2"),
            linear(f"{b}ff.pre", f"{b}norm2", f"{b}ff.layers.0"),
            Operation("gelu", f"{b}ff.act", (f"{b}ff.pre",)),
            linear(f"{b}ff.out", f"{b}ff.act", f"{b}ff.layers.2"),
            Operation("residual", f"{b}resid_post", (f"{b}resid_mid", f"{b}ff.out")),
        ]
        x = f"{b}resid_post"
    head = "tok_emb.weight" if config.tie_weights else "out_head.weight"
    return [
        *found,
        layernorm("final_norm", x, "final_norm"),
        Operation("linear", "logits", ("final_norm",), (head,)),
        Operation("cross_entropy", "loss", ("logits", "targets")),
    ]
