"""GPT-2: the model, its loss, and its backward pass as the forward pass read from bottom to top."""

from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_gpt.block import Cache, Dropout, KVCache, block_backward, block_forward
from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.ops import cross_entropy, dropout, embedding, layernorm, linear
from numpy_gpt.parallel.memory import keep_freed_memory
from numpy_gpt.parallel.threads import all_cores, in_blocks
from numpy_gpt.parameters import (
    QKV,
    block_matrices,
    block_names,
    check_possible,
    check_shapes,
    initial_parameters,
    join,
    known_shapes,
    parameter_shapes,
    separate,
)
from numpy_gpt.random.generator import Generator
from numpy_gpt.typing import Array, Float, Params, Weights

HEAD_ROWS = 256
"""Tokens whose logits are held at a time while computing the loss: (HEAD_ROWS, V) numbers for any B · T."""


def checked_ids(what: str, tokens: npt.ArrayLike, vocab_size: int) -> Array:
    """tokens as a (B, T) int64 array of ids below vocab_size. Raises InputError, naming `what`, if they are not."""
    try:
        ids = np.asarray(tokens)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{what} must be a (B, T) array of whole numbers: its rows have different lengths") from error
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{what} must be a non-empty (B, T) array of whole numbers, not {ids.dtype} {ids.shape}")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise InputError(
            f"{what}: id {ids[outside][0]} is outside the vocabulary of {vocab_size}: "
            "use the encoding the model was made for"
        )
    return np.asarray(ids, np.int64)


class GPT:
    """A GPT-2 whose parameters are the arrays of `params` and nothing else.

    params: name -> array, in torch's state_dict order and layout. Writing into one in place, or replacing it by
    another of the same shape and dtype, changes the model at once; one that does not fit raises InputError when the
    model is next used.
    """

    def __init__(self, config: GPTConfig, seed: int | Generator = 123, dtype: Float = np.float32):
        """The model of `torch.manual_seed(seed); GPTModel(config)`; a Generator continues from its current state."""
        rng = seed if isinstance(seed, Generator) else Generator(seed)
        self.config, self.dtype = config, _float_dtype(dtype)
        check_possible(config)
        self.params: Params
        self._lay_out(initial_parameters(config, rng, self.dtype))

    @classmethod
    def from_params(cls, config: GPTConfig, params: Weights) -> "GPT":
        """Make a model of these arrays, in the order of parameter_shapes.

        The blocks' matrices are copied, to lie side by side; the other arrays are used as they are. So train
        model.params, not the params given. Tensors in a file are read one by one, once all are known to fit.

        Raises InputError naming the first parameter that is missing, unknown, of another shape or another dtype.
        """
        check_shapes(config, {name: array.shape for name, array in params.items()})
        model = cls.__new__(cls)
        model.config, model.dtype = config, _float_dtype(params["tok_emb.weight"].dtype)
        for name in parameter_shapes(config):
            if params[name].dtype != model.dtype:
                raise InputError(
                    f"parameter {name} is {params[name].dtype}, tok_emb.weight is {model.dtype}: use one dtype"
                )
        model._lay_out(params)
        return model

    def _lay_out(self, params: Weights) -> None:
        """Copy the blocks' matrices, with query, key and value as thirds of one array."""
        self._blocks = [block_matrices(self.config, self.dtype) for _ in range(self.config.n_layers)]
        own = {
            names[short]: array
            for i, names in enumerate(block_names(self.config))
            for short, array in separate(self._blocks[i]).items()
        }
        self.params = {}
        for name in parameter_shapes(self.config):
            array = np.asarray(params[name])
            if name in own:
                own[name][...] = array
            self.params[name] = own.get(name, array)
        self._thirds = [{each: own[names[f"att.{each}.weight"]] for each in QKV} for names in block_names(self.config)]
        self._buffers: Params = {}
        self._block_buffers: list[Params] = []

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and deepcopy configuration and parameters; buffers and gradients stay behind."""
        return {"config": self.config, "dtype": self.dtype, "params": self.params}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep the arrays of params, which an optimiser copied along shares; they no longer lie side by side."""
        self.__dict__.update(state)
        self._blocks, self._thirds = [], []
        self._buffers, self._block_buffers = {}, []

    @all_cores()
    def __call__(self, tokens: npt.ArrayLike) -> Array:
        """Logits, without dropout: tokens (B, T) ints -> (B, T, V)."""
        h, _ = self._hidden_forward(self._checked("tokens", tokens), None, keep=False)
        return linear.linear_forward(h, self._head(), None)[0]

    @all_cores()
    def loss(self, tokens: npt.ArrayLike, targets: npt.ArrayLike) -> Any:
        """Mean cross-entropy in nats per token, without dropout, a scalar of the model's dtype; both (B, T) ints."""
        ids, want = self._checked_pair(tokens, targets)
        h, _ = self._hidden_forward(ids, None, keep=False)
        return self._head_loss(h, want, backward=False)[0]

    @all_cores()
    def loss_and_grads(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, rng: Generator | None = None, parts: int = 1
    ) -> tuple[Any, Params]:
        """The loss as in `loss`, and its gradient in every parameter, under the parameters' names, shapes and dtype.

        rng given: dropout is on, its masks drawn in torch's order (embeddings; per block the attention probabilities,
        the attention branch, the feed-forward branch). The gradients belong to the model and are
        overwritten by its next call: use one model from one thread at a time.

        parts: the batch in this many equal parts, one after the other, whose gradients are added up (gradient
        accumulation): the same mean over the batch, with the memory of a part. Each part draws its own masks.
        Raises InputError unless parts divides B.
        """
        ids, want = self._checked_pair(tokens, targets)
        if parts < 1 or len(ids) % parts:
            raise InputError(f"a batch of {len(ids)} cannot be split into {parts} equal parts: choose a divisor")
        if not self._buffers:
            keep_freed_memory()
            outside, shapes = {"tok_emb.weight", self._head_name()}, known_shapes(self.config)
            self._buffers = {name: np.empty(shapes[name], self.dtype) for name in outside}
            self._block_buffers = [block_matrices(self.config, self.dtype) for _ in range(self.config.n_layers)]
        loss, grads = self.dtype.type(0), dict[str, Array]()
        for i, (x, y) in enumerate(zip(np.split(ids, parts), np.split(want, parts), strict=True)):
            part_loss, part_grads = self._part(x, y, rng, tokens=want.size, add=i > 0)
            loss += part_loss
            for name, grad in part_grads.items():
                if i == 0 or self._buffered(name):
                    grads[name] = grad
                else:
                    grads[name] += grad
        return loss, {name: grads[name] for name in self.params}

    def _part(self, ids: Array, want: Array, rng: Generator | None, tokens: int, add: bool) -> tuple[Any, Params]:
        """Part of a batch of `tokens` tokens: its share of the mean loss, and of the gradients.

        add: add to the gradients that have buffers, instead of overwriting them.
        """
        h, c_hidden = self._hidden_forward(ids, rng, keep=True)
        loss, dh, dw_head = self._head_loss(h, want, backward=True, tokens=tokens, add=add)
        return loss, self._hidden_backward(dh, c_hidden, dw_head, add)

    def _buffered(self, name: str) -> bool:
        """Whether a gradient is written into a buffer that the model keeps: those of the large matrices."""
        return name.endswith(".weight") and name != "pos_emb.weight"

    @all_cores()
    def next_logits(self, tokens: npt.ArrayLike, past: KVCache) -> Array:
        """Logits after the last token only (B, V), given the tokens (B, T) that follow those in `past`, which grows."""
        ids = self._checked("tokens", tokens, room=self.config.context_length - past.length)
        h, _ = self._hidden_forward(ids, None, keep=False, past=past)
        past.length += ids.shape[1]
        return linear.linear_forward(h[:, -1], self._head(), None)[0]

    def _head(self) -> Array:
        return self.params[self._head_name()]  # (V, C)

    def _head_name(self) -> str:
        return "tok_emb.weight" if self.config.tie_weights else "out_head.weight"

    def _check_parameters(self) -> None:
        """Raise InputError naming a parameter that was replaced by one that does not fit the model."""
        for name, array in self.params.items():
            if not isinstance(array, np.ndarray):
                raise InputError(f"parameter {name} must be a NumPy array, not a {type(array).__name__}")
            if array.dtype != self.dtype:
                raise InputError(f"parameter {name} is {array.dtype}, the model {self.dtype}: use one dtype")
        shapes = {name: array.shape for name, array in self.params.items()}
        if shapes != known_shapes(self.config):
            check_shapes(self.config, shapes)

    def _block(self, i: int) -> Params:
        """Block i's parameters under its own names, with att.W_qkv for the query's, the key's and the value's."""
        p = {name: self.params[full] for name, full in block_names(self.config)[i].items()}
        if not self._thirds:  # a copy
            return join(p)
        for name, third in self._thirds[i].items():
            if p[f"att.{name}.weight"] is not third:
                return join(p)  # the parameter was replaced
        return join(p, self._blocks[i]["att.W_qkv.weight"])  # (3C, C)

    def _hidden_forward(
        self, ids: Array, rng: Generator | None, keep: bool, past: KVCache | None = None
    ) -> tuple[Array, Cache]:
        """ids (B, T) -> the final LayerNorm's output (B, T, C); without keep, no caches."""
        self._check_parameters()
        p, config = self.params, self.config
        drop = Dropout(config.drop_rate, rng, self.dtype)
        x, c_tok = embedding.embedding_forward(ids, p["tok_emb.weight"])
        start = 0 if past is None else past.length
        x, c_pos = embedding.position_embedding_forward(x, p["pos_emb.weight"], start)
        x, c_drop = dropout.dropout_forward(x, drop.mask(x.shape))
        c_blocks = []
        for i in range(config.n_layers):
            x, c_block = block_forward(x, self._block(i), config.n_heads, drop, past, i)
            if keep:
                c_blocks.append(c_block)
            del c_block  # or it would live until the next block is done
        x, c_norm = layernorm.layernorm_forward(x, p["final_norm.scale"], p["final_norm.shift"])
        return x, (c_tok, c_pos, c_drop, c_blocks, c_norm)

    def _head_loss(
        self, h: Array, want: Array, backward: bool, tokens: int | None = None, add: bool = False
    ) -> tuple[Any, Array, Any]:
        """h, want (B, T) of them -> the loss; and if backward dh and the head's dw. HEAD_ROWS logits at a time.

        tokens: the mean's divisor (default: those in want). add: add to the head's gradient of the previous part.
        """
        V, C = self._head().shape
        N = want.size
        tokens = tokens or N
        flat, targets = h.reshape(N, C), want.reshape(N)
        scratch = np.empty((min(N, HEAD_ROWS), V), h.dtype)
        dh, dw = np.empty_like(flat), self._buffers.get(self._head_name())
        loss = self.dtype.type(0)
        for start in range(0, N, HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            part = len(targets[rows]) / tokens  # of the mean
            logits, c_head = linear.linear_forward(flat[rows], self._head(), None, out=scratch[: len(targets[rows])])
            part_loss, c_loss = cross_entropy.cross_entropy_forward(logits, targets[rows], out=logits)
            loss += part_loss * part
            if backward:
                dlogits = cross_entropy.cross_entropy_backward(part, c_loss, out=logits)
                dh[rows], dw, _ = linear.linear_backward(dlogits, c_head, dw, add=add or start > 0)
        return loss, dh.reshape(h.shape), dw

    def _hidden_backward(self, dx: Array, cache: Cache, dw_head: Array, add: bool) -> Params:
        """dx (B, T, C) of the final LayerNorm's output, and the head's gradient -> the gradients of all parameters.

        add: add to what the buffers hold.
        """
        c_tok, c_pos, c_drop, c_blocks, c_norm = cache
        grads: Params = {self._head_name(): dw_head}
        dx, grads["final_norm.scale"], grads["final_norm.shift"] = layernorm.layernorm_backward(dx, c_norm)
        names = block_names(self.config)
        for i in reversed(range(self.config.n_layers)):
            block = dict(self._block_buffers[i])
            dx = block_backward(dx, c_blocks.pop(), block, add)  # popped: frees the activations block by block
            grads |= {names[i][short]: grad for short, grad in separate(block).items()}
        dx = dropout.dropout_backward(dx, c_drop)
        dx, grads["pos_emb.weight"] = embedding.position_embedding_backward(dx, c_pos)
        if self.config.tie_weights:
            dw = dw_head  # used twice
        else:
            dw = self._buffers["tok_emb.weight"]
            if not add:
                _clear(dw)
        grads["tok_emb.weight"] = embedding.embedding_backward(dx, c_tok, dw)
        return grads

    def _checked(self, what: str, tokens: npt.ArrayLike, room: int | None = None) -> Array:
        """tokens as checked_ids returns them, at most room (None: context_length) in a row."""
        ids = checked_ids(what, tokens, self.config.vocab_size)
        room = self.config.context_length if room is None else room
        if ids.shape[1] > room:
            raise InputError(
                f"{what}: T = {ids.shape[1]} is over the {room} positions left of context_length "
                f"{self.config.context_length}: shorten the input"
            )
        return ids

    def _checked_pair(self, tokens: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[Array, Array]:
        ids, want = self._checked("tokens", tokens), self._checked("targets", targets)
        if ids.shape != want.shape:
            raise InputError(f"tokens {ids.shape} and targets {want.shape} must have one shape")
        return ids, want


def _float_dtype(dtype: Float) -> Any:
    try:
        found = None if dtype is None else np.dtype(dtype)  # NumPy takes None for float64
    except TypeError:
        found = None
    if found not in (np.float32, np.float64):
        raise InputError(f"a model is float32 or float64, not {dtype if found is None else found}")
    return found


def _clear(a: Array) -> None:
    def clear(rows: Array) -> None:
        rows[...] = 0

    in_blocks(clear, a)
