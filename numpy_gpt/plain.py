"""GPT-2 as a textbook would write it, forward and backward: read this first.

Each operation is a pair: X_forward, its formula, returns the output and a cache; under it X_backward takes the output's
gradient and the cache, and by the chain rule returns the inputs' gradients: dx means ∂loss/∂x. A comment's "; y = …"
quotes the forward formula. Arguments are not checked, and only AdamW writes into them.

Shapes: B texts of T tokens, C features, NH heads of HS = C / NH features, a vocabulary of V; "..." is any leading axes.
numpy_gpt/ops has the same operations with the same arguments, made fast, and numpy_gpt/model.py the same model.
"""

import math
from typing import Any

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.typing import Array, Float, Params


def embedding_forward(ids: Array, w: Array) -> tuple[Array, Any]:
    """y = w[ids]: each token's row of the table. ids (B, T), w (V, C) -> y (B, T, C)."""
    return w[ids], (ids, w)


def embedding_backward(dy: Array, cache: Any) -> Array:
    """dy (B, T, C) -> dw (V, C), which is 0 in the rows of tokens that did not occur."""
    ids, w = cache
    dw: Array = np.zeros_like(w)  # (V, C)
    np.add.at(dw, ids, dy)  # y = w[ids]; a repeated token's gradients add up here: dw[ids] += dy would keep only one
    return dw


def position_embedding_forward(x: Array, w: Array, start: int = 0) -> tuple[Array, Any]:
    """y = x + w[start : start + T]: every position's row. x (B, T, C), w (context_length, C) -> y (B, T, C)."""
    return x + w[start : start + x.shape[1]], (w, start)


def position_embedding_backward(dy: Array, cache: Any) -> tuple[Array, Array]:
    """dy (B, T, C) -> dx (B, T, C), dw (context_length, C)."""
    w, start = cache
    dw = np.zeros_like(w)  # (context_length, C)
    dw[start : start + dy.shape[1]] = dy.sum(axis=0)  # y = x + w[start : start + T], the same rows in all B texts
    return dy, dw


def rows(x: Array) -> Array:
    """x (..., C) -> (N, C): one row per token."""
    return x.reshape(-1, x.shape[-1])


def linear_forward(x: Array, w: Array, b: Array | None) -> tuple[Array, Any]:
    """y = x @ wᵀ + b. x (..., I), w (O, I), b (O,) or None -> y (..., O)."""
    y = x @ w.T  # (..., O)
    return y if b is None else y + b, (x, w, b)


def linear_backward(dy: Array, cache: Any) -> tuple[Array, Array, Any]:
    """dy (..., O) -> dx (..., I), dw (O, I), db (O,) or None."""
    x, w, b = cache
    dx = dy @ w  # (..., I); y = x @ w.T + b
    dw = rows(dy).T @ rows(x)  # (O, I): every row of x met the same w, so their gradients add up
    db = None if b is None else rows(dy).sum(axis=0)  # (O,)
    return dx, dw, db


def layernorm_forward(x: Array, scale: Array, shift: Array) -> tuple[Array, Any]:
    """y = x̂ · scale + shift,  x̂ = (x − mean(x)) / √(var(x) + 1e-5). x (..., C), scale, shift (C,) -> y (..., C)."""
    centred = x - x.mean(axis=-1, keepdims=True)  # (..., C)
    centred = centred - centred.mean(axis=-1, keepdims=True)  # again: rounding is left, and may be divided by √1e-5
    rstd = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)  # (..., 1)
    x_hat = centred * rstd  # (..., C)
    return x_hat * scale + shift, (x_hat, rstd, scale)


def layernorm_backward(dy: Array, cache: Any) -> tuple[Array, Array, Array]:
    """dy (..., C) -> dx (..., C), dscale (C,), dshift (C,)."""
    x_hat, rstd, scale = cache
    dscale = rows(dy * x_hat).sum(axis=0)  # (C,); y = x_hat * scale + shift
    dshift = rows(dy).sum(axis=0)  # (C,)
    g = dy * scale  # (..., C), the gradient of x_hat
    # x_hat has mean 0 and (but for the 1e-5) length √C, whatever x: g's parts along 1 and along x_hat are removed
    along_1, along_x_hat = g.mean(axis=-1, keepdims=True), (g * x_hat).mean(axis=-1, keepdims=True)  # (..., 1)
    dx = rstd * (g - along_1 - x_hat * along_x_hat)  # (..., C)
    return dx, dscale, dshift


def gelu_forward(x: Array) -> tuple[Array, Any]:
    """y = ½ x (1 + tanh u),  u = √(2/π) (x + 0.044715 x³), elementwise. x -> y, of the same shape."""
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), (x, t)


def gelu_backward(dy: Array, cache: Any) -> Array:
    """dy -> dx, of the same shape."""
    x, t = cache
    du_dx = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)  # u = sqrt(2/pi) * (x + 0.044715 * x**3)
    dt_dx = (1 - t**2) * du_dx  # t = tanh(u)
    dx: Array = dy * (0.5 * (1 + t) + 0.5 * x * dt_dx)  # y = 0.5 * x * (1 + t)
    return dx


def dropout_mask(keep: Array, drop_rate: float, dtype: Float) -> Array:
    """Dropout's factors, of keep's shape: 0 where keep is False, else 1 / (1 − drop_rate), which keeps the mean."""
    return keep.astype(dtype) / (1 - drop_rate if drop_rate < 1 else 1)


def dropout_forward(x: Array, mask: Array | None) -> tuple[Array, Any]:
    """y = x · mask, all of the same shape; mask None: no dropout."""
    return x if mask is None else x * mask, mask


def dropout_backward(dy: Array, mask: Array | None) -> Array:
    """dy -> dx, of the same shape."""
    return dy if mask is None else dy * mask  # y = x * mask


def attention_forward(q: Array, k: Array, v: Array, mask: Array | None = None) -> tuple[Array, Any]:
    """y = dropout(p) @ v,  p = softmax(s),  s = q @ kᵀ / √HS: for each query a weighted mean of the values up to it.

    q (B, NH, T, HS), k, v (B, NH, S, HS) -> y (B, NH, T, HS). The queries are the last T of S positions; below S = T.
    """
    T, HS, S = q.shape[2], q.shape[3], k.shape[2]
    future = np.arange(S) > np.arange(S - T, S)[:, None]  # (T, S): the key's position is after the query's
    s = np.where(future, -np.inf, q @ k.mT / math.sqrt(HS))  # (B, NH, T, S)
    e = np.exp(s - s.max(axis=-1, keepdims=True))  # (B, NH, T, S): subtracting the max leaves p unchanged
    p = e / e.sum(axis=-1, keepdims=True)  # (B, NH, T, S): 0 in the future, else positive; rows add up to 1
    a, _ = dropout_forward(p, mask)  # (B, NH, T, S)
    return a @ v, (q, k, v, p, a, mask)


def attention_backward(dy: Array, cache: Any) -> tuple[Array, Array, Array]:
    """dy (B, NH, T, HS) -> dq (B, NH, T, HS), dk, dv (B, NH, S, HS)."""
    q, k, v, p, a, mask = cache
    dv = a.mT @ dy  # (B, NH, S, HS); y = a @ v
    dp = dropout_backward(dy @ v.mT, mask)  # (B, NH, T, S); y = a @ v, a = dropout(p)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))  # Σ_i dp_i ∂p_i/∂s_j; ∂p_i/∂s_j = p_i (δ_ij − p_j)
    dqk = ds / math.sqrt(q.shape[-1])  # (B, NH, T, S); s = q @ k.mT / sqrt(HS); each row of ds adds up to 0
    return dqk @ k, dqk.mT @ q, dv


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Any, Any]:
    """loss = mean over the N targets of −log p[target],  p = softmax(logits). logits (..., V), targets (...) -> ()."""
    z, N, ids = rows(logits), targets.size, targets.ravel()  # z (N, V), ids (N,)
    z = z - z.max(axis=1, keepdims=True)  # (N, V): exp cannot overflow
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))  # (N, V): log of softmax, without a log of 0
    return -log_p[np.arange(N), ids].mean(), (log_p, ids, logits.shape)


def cross_entropy_backward(dloss: float, cache: Any) -> Array:
    """dloss () -> dlogits (..., V); dloss is 1 if nothing follows the loss."""
    log_p, ids, shape = cache
    dz = np.exp(log_p)  # (N, V): p
    dz[np.arange(len(ids)), ids] -= 1  # p − 1 at the target; loss_n = log Σ exp(z) − z[target]
    dlogits: Array = dz.reshape(shape) * (dloss / len(ids))  # (..., V); loss = mean of the loss_n
    return dlogits


def split_heads(x: Array, n_heads: int) -> Array:
    """x (B, T, C) -> (B, NH, T, HS)."""
    return x.reshape(*x.shape[:2], n_heads, -1).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """x (B, NH, T, HS) -> (B, T, C)."""
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


def block_forward(x: Array, p: Params, n_heads: int, masks: Any) -> tuple[Array, Any]:
    """mid = x + dropout(attention(norm1(x))),  y = mid + dropout(feed_forward(norm2(mid))): x, mid, y (B, T, C)."""
    h, c_norm1 = layernorm_forward(x, p["norm1.scale"], p["norm1.shift"])  # (B, T, C)
    q, c_q = linear_forward(h, p["att.W_query.weight"], p.get("att.W_query.bias"))  # (B, T, C)
    k, c_k = linear_forward(h, p["att.W_key.weight"], p.get("att.W_key.bias"))  # (B, T, C)
    v, c_v = linear_forward(h, p["att.W_value.weight"], p.get("att.W_value.bias"))  # (B, T, C)
    q, k, v = (split_heads(each, n_heads) for each in (q, k, v))  # (B, NH, T, HS)
    h, c_att = attention_forward(q, k, v, next(masks))  # (B, NH, T, HS)
    h, c_out = linear_forward(merge_heads(h), p["att.out_proj.weight"], p["att.out_proj.bias"])  # (B, T, C)
    h, c_drop1 = dropout_forward(h, next(masks))  # (B, T, C)
    mid = x + h  # (B, T, C)
    h, c_norm2 = layernorm_forward(mid, p["norm2.scale"], p["norm2.shift"])  # (B, T, C)
    h, c_ff0 = linear_forward(h, p["ff.layers.0.weight"], p["ff.layers.0.bias"])  # (B, T, 4C)
    h, c_gelu = gelu_forward(h)  # (B, T, 4C)
    h, c_ff2 = linear_forward(h, p["ff.layers.2.weight"], p["ff.layers.2.bias"])  # (B, T, C)
    h, c_drop2 = dropout_forward(h, next(masks))  # (B, T, C)
    return mid + h, (c_norm1, c_q, c_k, c_v, c_att, c_out, c_drop1, c_norm2, c_ff0, c_gelu, c_ff2, c_drop2, n_heads)


def block_backward(dy: Array, cache: Any) -> tuple[Array, Params]:
    """dy (B, T, C) -> dx (B, T, C), and the parameters' gradients by name: block_forward's lines in reverse."""
    c_norm1, c_q, c_k, c_v, c_att, c_out, c_drop1, c_norm2, c_ff0, c_gelu, c_ff2, c_drop2, n_heads = cache
    grads: Params = {}
    dh = dropout_backward(dy, c_drop2)  # (B, T, C)
    dh, grads["ff.layers.2.weight"], grads["ff.layers.2.bias"] = linear_backward(dh, c_ff2)  # (B, T, 4C)
    dh = gelu_backward(dh, c_gelu)  # (B, T, 4C)
    dh, grads["ff.layers.0.weight"], grads["ff.layers.0.bias"] = linear_backward(dh, c_ff0)  # (B, T, C)
    dh, grads["norm2.scale"], grads["norm2.shift"] = layernorm_backward(dh, c_norm2)  # (B, T, C)
    dmid = dy + dh  # (B, T, C); y = mid + h: dy takes both paths, past the branch and through it
    dh = dropout_backward(dmid, c_drop1)  # (B, T, C)
    dh, grads["att.out_proj.weight"], grads["att.out_proj.bias"] = linear_backward(dh, c_out)  # (B, T, C)
    dq, dk, dv = attention_backward(split_heads(dh, n_heads), c_att)  # (B, NH, T, HS)
    dq, dk, dv = (merge_heads(each) for each in (dq, dk, dv))  # (B, T, C)
    dh_v, grads["att.W_value.weight"], grads["att.W_value.bias"] = linear_backward(dv, c_v)  # (B, T, C)
    # a key bias b adds q @ b to all scores of a query alike; softmax ignores it: b's gradient is 0 but for rounding
    dh_k, grads["att.W_key.weight"], grads["att.W_key.bias"] = linear_backward(dk, c_k)  # (B, T, C)
    dh_q, grads["att.W_query.weight"], grads["att.W_query.bias"] = linear_backward(dq, c_q)  # (B, T, C)
    dh = dh_q + dh_k + dh_v  # (B, T, C): queries, keys and values read the same h
    dh, grads["norm1.scale"], grads["norm1.shift"] = layernorm_backward(dh, c_norm1)  # (B, T, C)
    return dmid + dh, grads  # mid = x + h: dmid takes both paths


def model_forward(params: Params, tokens: Array, config: GPTConfig, masks: Any) -> tuple[Array, Any]:
    """tokens (B, T) -> logits (B, T, V). masks: dropout's, in order of use (1, then 3 per block), or None."""
    masks = iter([None] * (1 + 3 * config.n_layers) if masks is None else masks)
    x, c_tokens = embedding_forward(tokens, params["tok_emb.weight"])  # (B, T, C)
    x, c_positions = position_embedding_forward(x, params["pos_emb.weight"])  # (B, T, C)
    x, c_drop = dropout_forward(x, next(masks))  # (B, T, C)
    c_blocks = []
    for i in range(config.n_layers):
        prefix = f"trf_blocks.{i}."
        p = {name.removeprefix(prefix): each for name, each in params.items() if name.startswith(prefix)}
        x, c_block = block_forward(x, p, config.n_heads, masks)  # (B, T, C)
        c_blocks.append(c_block)
    x, c_norm = layernorm_forward(x, params["final_norm.scale"], params["final_norm.shift"])  # (B, T, C)
    head = params["tok_emb.weight" if config.tie_weights else "out_head.weight"]  # (V, C)
    logits, c_head = linear_forward(x, head, None)  # (B, T, V)
    return logits, (c_tokens, c_positions, c_drop, c_blocks, c_norm, c_head)


def model_backward(dlogits: Array, cache: Any, config: GPTConfig) -> Params:
    """dlogits (B, T, V) -> the gradients of all parameters by name: model_forward's lines in reverse."""
    c_tokens, c_positions, c_drop, c_blocks, c_norm, c_head = cache
    grads: Params = {}
    dx, grads["out_head.weight"], _ = linear_backward(dlogits, c_head)  # (B, T, C)
    dx, grads["final_norm.scale"], grads["final_norm.shift"] = layernorm_backward(dx, c_norm)  # (B, T, C)
    for i in reversed(range(config.n_layers)):
        dx, block_grads = block_backward(dx, c_blocks[i])  # (B, T, C)
        grads |= {f"trf_blocks.{i}.{name}": each for name, each in block_grads.items()}
    dx = dropout_backward(dx, c_drop)  # (B, T, C)
    dx, grads["pos_emb.weight"] = position_embedding_backward(dx, c_positions)  # (B, T, C)
    grads["tok_emb.weight"] = embedding_backward(dx, c_tokens)  # (V, C)
    if config.tie_weights:
        grads["tok_emb.weight"] += grads.pop("out_head.weight")  # one array, used twice: gradients add up
    return grads


def forward(params: Params, tokens: Array, config: GPTConfig, masks: list[Any] | None = None) -> Array:
    """tokens (B, T) -> logits (B, T, V). masks: as in model_forward."""
    return model_forward(params, tokens, config, masks)[0]


def loss_and_grads(
    params: Params, tokens: Array, targets: Array, config: GPTConfig, masks: list[Any] | None = None
) -> tuple[Any, Params]:
    """tokens, targets (B, T) -> the loss in nats per token, and all gradients by name. masks: as in model_forward."""
    logits, c_model = model_forward(params, tokens, config, masks)  # (B, T, V)
    loss, c_loss = cross_entropy_forward(logits, targets)  # ()
    dlogits = cross_entropy_backward(1.0, c_loss)  # (B, T, V)
    grads = model_backward(dlogits, c_model, config)
    return loss, {name: grads[name] for name in params}


def generate(params: Params, tokens: Array, max_new_tokens: int, config: GPTConfig) -> Array:
    """tokens (B, T) -> (B, T + max_new_tokens): the likeliest next token is appended, again and again."""
    ids = np.array(tokens, np.int64)  # (B, T)
    for _ in range(max_new_tokens):
        logits = forward(params, ids[:, -config.context_length :], config)  # (B, T, V), T ≤ context_length
        ids = np.concatenate([ids, logits[:, -1:].argmax(axis=2)], axis=1)  # (B, T + 1)
    return ids


def adamw_step(
    params: Params, grads: Params, m: Params, v: Params, t: int, lr: float = 1e-3, weight_decay: float = 0.01
) -> None:
    """Step t = 1, 2, … of AdamW. Writes into params, and into m and v, which are zeros of the same shapes at first."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    for name, g in grads.items():
        m[name][...] = beta1 * m[name] + (1 - beta1) * g  # running mean of the gradient
        v[name][...] = beta2 * v[name] + (1 - beta2) * g * g  # and of its square
        m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)  # corrected for starting at 0
        params[name] *= 1 - lr * weight_decay  # weight decay, on all parameters
        params[name] -= lr * m_hat / (np.sqrt(v_hat) + eps)
