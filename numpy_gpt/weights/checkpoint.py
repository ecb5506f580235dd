"""Checkpoints: safetensors files (data, never code) with the configuration inside, written atomically.

A checkpoint is a folder with model.safetensors, the parameters under their own names, and for a model in training a
file training-….safetensors with the state of its optimiser, random stream and loop. model.safetensors names its
training file and is written last, so at every instant of a save the two belong to the same step. A run keeps its
checkpoint in the subfolder checkpoint.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.errors import InputError, NonFiniteError
from numpy_gpt.io.bounded_json import SMALL, parse_json
from numpy_gpt.io.files import being_written, flush, partial_folder, sweep_folder
from numpy_gpt.io.paths import check_readable, is_file, kind_of
from numpy_gpt.model import GPT
from numpy_gpt.parameters import check_shapes, parameter_shapes
from numpy_gpt.typing import Float, Params, Weights
from numpy_gpt.weights.stored import Stored, check_finite
from numpy_gpt.weights.tensors import FIX, SHA256, read_tensors, seal, write_tensors

MODEL_FILE = "model.safetensors"
TRAINING_FILE = re.compile(r"training-[0-9a-f]{16}\.safetensors")
"""The name of a training file: a hash of its content, so that a new one never overwrites an old one."""

RESERVED = {"format", "version", "config", "training"}
"""Metadata keys of the model's file that callers may not set."""

EMBEDDINGS = ("tok_emb.weight", "out_head.weight", "wte.weight", "lm_head.weight")
"""Endings of tensor names that identify another program's GPT-2: the book's or Hugging Face's."""

FOREIGN = ("config.json", "hparams.json")
"""Files found in folders of Hugging Face's or OpenAI's GPT-2, but not in ours."""

VERSION = 1
"""Version of the format, in every file's metadata."""


class Header(NamedTuple):
    """A checkpoint's configuration and metadata, read without its tensors."""

    file: Path
    config: GPTConfig
    tensors: dict[str, Stored]  # those of the configuration, of its shapes
    about: dict[str, str]  # other metadata: the encoding's name and so on


def save(
    model: GPT, path: str | os.PathLike[str], *, training: Params | None = None, about: Mapping[str, str] | None = None
) -> None:
    """Write the model to path: a file if it ends in .safetensors, else a folder with model.safetensors.

    training: arrays to resume from, like AdamW.state(), saved next to the model (a folder only). about: more metadata,
    like {"encoding": "gpt2"}. A file appears under its name only when complete. Raises InputError if path cannot be
    written.
    """
    save_params(model.config, model.params, path, training=training, about=about)


def save_params(
    config: GPTConfig,
    params: Weights,
    path: str | os.PathLike[str],
    *,
    training: Params | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Do what `save` does, given a configuration and parameters instead of a model."""
    target = Path(path)
    kind_of(target)  # raises InputError for an impossible path
    if not os.fspath(path):
        raise InputError("the path to save to is empty: give a folder, or a file that ends in .safetensors")
    single = target.suffix == ".safetensors"
    if single and training is not None:
        raise InputError(f"{target} is a single file: give a folder to save the training state with the model")
    if wrong := RESERVED & (about or {}).keys():
        raise InputError(f"about={{{min(wrong)!r}: …}} is a reserved name: choose another")
    metadata = {**(about or {}), "format": "numpy-gpt", "version": str(VERSION), "config": json.dumps(config.to_dict())}
    _check_loadable(config, params)
    try:
        folder = target.parent if single else target
        folder.mkdir(parents=True, exist_ok=True)
        flush(folder.parent)
        if single:
            write_tensors(target, params, metadata)
            return
        try:
            _drop_training(target)  # left by killed saves
            if training is None:
                write_tensors(target / MODEL_FILE, params, metadata)
                return
            kind = {"format": "numpy-gpt training", "version": str(VERSION)}
            metadata["training"] = f"training-{seal(training, kind)[SHA256][:16]}.safetensors"
            with partial_folder(target / metadata["training"]):  # marks it as unfinished until it is named
                write_tensors(target / metadata["training"], training, kind)
                write_tensors(target / MODEL_FILE, params, metadata)
        finally:
            _drop_training(target)  # the old model's; after a failure the new one's
    except OSError as error:
        raise InputError(f"cannot save to {target}: {error.strerror or error}; choose another place") from error


def _check_loadable(config: GPTConfig, params: Weights) -> None:
    """Raise InputError for parameters that `load` would refuse, so that they never replace a loadable model."""
    try:
        check_shapes(config, {name: array.shape for name, array in params.items()})
        for name, array in params.items():
            if array.dtype != params["tok_emb.weight"].dtype or array.dtype not in (np.float32, np.float64):
                raise InputError(f"parameter {name} is {array.dtype}: all parameters must be float32, or all float64")
            check_finite(np.asarray(array), name)
    except NonFiniteError as error:
        raise NonFiniteError(f"nothing was saved: {error}") from error
    except InputError as error:
        raise InputError(f"nothing was saved: {error}") from error


def _drop_training(folder: Path) -> None:
    """Remove the training files that the model's file on disk does not name, and leftovers of killed saves.

    If that file cannot be read, all stay; files that cannot be removed are left to a later save.
    """
    sweep_folder(folder)
    try:
        named = read_tensors(folder / MODEL_FILE)[0].get("training")
    except InputError:
        if os.path.lexists(folder / MODEL_FILE):
            return
        named = None
    with suppress(OSError):
        for file in folder.iterdir():
            if TRAINING_FILE.fullmatch(file.name) and file.name != named and not being_written(file):
                with suppress(OSError):
                    file.unlink()


def load(path: str | os.PathLike[str], dtype: Float | None = None) -> GPT:
    """Load the model of a run folder, a checkpoint folder or a safetensors file, in dtype (None: the file's).

    Reads each tensor once, directly into place. Raises InputError if there is no model, or if it is damaged, does not
    fit its configuration, or has NaN or infinity in it.
    """
    config, params = load_params(path, dtype)
    return GPT.from_params(config, params)


def load_params(path: str | os.PathLike[str], dtype: Float | None = None) -> tuple[GPTConfig, dict[str, Stored]]:
    """Configuration and parameters as `load` reads them, without a model; each is read on demand."""
    header = read_header(path)
    dtypes = {tensor.dtype for tensor in header.tensors.values()}
    if dtype is None and dtypes - {np.dtype(np.float32), np.dtype(np.float64)}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise InputError(f"{header.file} holds {names}: load it with dtype=np.float32")
    tensors = header.tensors if dtype is None else {n: t.astype(dtype) for n, t in header.tensors.items()}
    return header.config, {name: tensor.finite(header.file, name) for name, tensor in tensors.items()}


def load_training(path: str | os.PathLike[str]) -> Params:
    """Load the arrays given to `save` as training. Raises InputError if the checkpoint has none."""
    header = read_header(path)
    name = header.about.get("training")
    if name is None:
        raise InputError(f"{path} has a model but no training state to resume from: start from it with --init instead")
    file = header.file.parent / name[:80]
    if not TRAINING_FILE.fullmatch(name) or not file.is_file():
        raise InputError(f"{file}, this checkpoint's training state, is missing: start from the model with --init")
    about, tensors = read_tensors(file)
    if not name.startswith(f"training-{about.get(SHA256, 'none')[:16]}"):
        raise InputError(f"{file} is another checkpoint's training state: start from the model with --init instead")
    return {name: tensor.read() for name, tensor in tensors.items()}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the configuration, shapes and metadata of a checkpoint, but not its tensors.

    Raises InputError if it is not a numpy-gpt checkpoint or its header is damaged.
    """
    file = find_model(path)
    about, tensors = read_tensors(file)
    if about.get("format") != "numpy-gpt":
        raise InputError(
            f"{file} has no usable GPT configuration inside: it is not a numpy-gpt checkpoint"
            + (_import_by(Path(path)) if any(name.endswith(EMBEDDINGS) for name in tensors) else ", nor a GPT-2")
        )
    if SHA256 not in about:
        raise InputError(f"{file} lacks the checksum that every numpy-gpt checkpoint has: {FIX}")
    if (version := about.get("version")) != str(VERSION):
        raise InputError(f"{file} uses format {version!s:.40}; this release reads format {VERSION}: update numpy-gpt")
    try:
        config = GPTConfig.from_dict(parse_json(about.pop("config").encode(), SMALL))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{file} has no usable GPT configuration inside ({error})") from error
    try:
        check_shapes(config, {name: tensor.shape for name, tensor in tensors.items()})
    except InputError as error:
        raise InputError(f"{file} does not hold the model that its configuration describes: {error}") from error
    return Header(file, config, {name: tensors[name] for name in parameter_shapes(config)}, about)


def find_model(path: str | os.PathLike[str]) -> Path:
    """The safetensors file with the parameters for path. Raises InputError if there is none."""
    if not os.fspath(path):
        raise InputError("an empty path names no checkpoint: give a run folder, or . for the working directory")
    given = Path(path)
    kind = kind_of(given)
    for file in (given, given / MODEL_FILE, given / "checkpoint" / MODEL_FILE):
        if is_file(file):
            check_readable(file)
            return file
    if kind == "folder" and (foreign := [name for name in FOREIGN if is_file(given / name)]):
        raise InputError(f"{given} has {foreign[0]} in it, but no checkpoint{_import_by(given)}")
    what = {"folder": "has no checkpoint in it", "missing": "does not exist"}.get(kind, "is not a regular file")
    size = given.name.removeprefix("gpt2-")
    hint = f" (to fetch GPT-2: numpy-gpt download {size})" if kind == "missing" and size in GPT2_SIZES else ""
    raise InputError(f"{given} {what}: give a run folder, a checkpoint folder or a .safetensors file{hint}")


def _import_by(path: Path) -> str:
    return f": if it is another program's GPT-2, numpy-gpt import {path} --out DIR makes a checkpoint of it"
