"""Checkpoints: safetensors files (data, never code) with the configuration inside, written whole or not at all.

A checkpoint is a folder with model.safetensors, the parameters under their own names, and for a model still in
training training.safetensors, what its optimiser, random stream and loop need to go on. A run's folder keeps its
checkpoint in the folder checkpoint.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.model import GPT
from numpy_gpt.typing import Float, Params

MODEL_FILE = "model.safetensors"
TRAINING_FILE = "training.safetensors"
PREVIOUS = "checkpoint.previous"
"""Where a run's old checkpoint stands for the instant in which the new one takes its place."""


class Header(NamedTuple):
    """What a checkpoint says of itself, read without its tensors."""

    file: Path
    config: GPTConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: set[str]
    about: dict[str, str]  # the metadata beside the configuration: the encoding's name and so on


def save(
    model: GPT, path: str | os.PathLike[str], *, training: Params | None = None, about: Mapping[str, str] | None = None
) -> None:
    """Write the model to path: a file if it ends in .safetensors, else a folder that gets model.safetensors.

    training: arrays to go on from, such as AdamW.state(), beside the model (a folder only). about: more metadata,
    such as {"encoding": "gpt2"}. A file appears under its name only when it is complete. Raises InputError if path
    cannot be written.
    """
    save_params(model.config, model.params, path, training=training, about=about)


def save_params(
    config: GPTConfig,
    params: Params,
    path: str | os.PathLike[str],
    *,
    training: Params | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """`save` for a configuration and its parameters without a model."""
    target = Path(path)
    single = target.suffix == ".safetensors"
    if single and training is not None:
        raise InputError(f"{target} is one file: give a folder to save the training state beside the model")
    metadata = {"format": "numpy-gpt", "config": json.dumps(config.to_dict()), **(about or {})}
    try:
        (target.parent if single else target).mkdir(parents=True, exist_ok=True)
        if training is not None:
            write_tensors(target / TRAINING_FILE, training, {"format": "numpy-gpt training"})
        write_tensors(target if single else target / MODEL_FILE, params, metadata)
        if training is None and not single:
            (target / TRAINING_FILE).unlink(missing_ok=True)  # another model's state: resuming with it would be wrong
    except OSError as error:
        raise InputError(f"cannot save to {target}: {error.strerror or error}; choose another place") from error


def load(path: str | os.PathLike[str], dtype: Float | None = None) -> GPT:
    """The model of a run folder, a checkpoint folder or a safetensors file, in dtype (None: the file's).

    Raises InputError if there is none, or it is cut short, or does not fit its own configuration.
    """
    config, params = load_params(path, dtype)
    return GPT.from_params(config, params)


def load_params(path: str | os.PathLike[str], dtype: Float | None = None) -> tuple[GPTConfig, Params]:
    """Configuration and parameters, as `load` reads them, without a model."""
    header = read_header(path)
    params = _read(header.file, lambda f: {name: f.get_tensor(name) for name in header.shapes})
    if dtype is not None:
        params = {name: array.astype(dtype, copy=False) for name, array in params.items()}
    elif header.dtypes - {"F32", "F64"}:
        raise InputError(f"{header.file} holds {', '.join(sorted(header.dtypes))}: load it with dtype=np.float32")
    return header.config, params


def load_training(path: str | os.PathLike[str]) -> Params:
    """The arrays given to `save` as training. Raises InputError where the checkpoint has none."""
    file = find_model(path).with_name(TRAINING_FILE)
    if not file.is_file():
        raise InputError(f"{path} holds a model but no training state to go on from: start from it with --init instead")
    arrays: Params = _read(file, lambda f: {name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118 (not a dict)
    return arrays


def read_header(path: str | os.PathLike[str]) -> Header:
    """The configuration, shapes and metadata of a checkpoint, without reading its tensors."""
    file = find_model(path)

    def read(f: Any) -> tuple[dict[str, str], dict[str, tuple[int, ...]], set[str]]:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        return dict(f.metadata() or {}), shapes, {each.get_dtype() for each in slices.values()}

    about, shapes, dtypes = _read(file, read)
    try:
        config = GPTConfig.from_dict(json.loads(about.pop("config")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{file} has no usable GPT configuration inside ({error}): is it a checkpoint of numpy-gpt?"
        ) from error
    return Header(file, config, shapes, dtypes, about)


def find_model(path: str | os.PathLike[str]) -> Path:
    """The safetensors file with the parameters that path stands for; InputError if there is none."""
    given = Path(path)
    if given.is_file():
        return given
    for file in (given / MODEL_FILE, given / "checkpoint" / MODEL_FILE, given / PREVIOUS / MODEL_FILE):
        if file.is_file():
            return file
    what = "has no checkpoint in it" if given.is_dir() else "does not exist"
    raise InputError(f"{given} {what}: give a run folder, a checkpoint folder or a .safetensors file")


def write_tensors(file: Path, tensors: Params, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside its place, flush it to the disk and rename it: readers see the old or the new."""
    from safetensors.numpy import save_file

    partial = file.with_name(f".{file.name}.partial")
    try:
        # the writer copies raw memory: a transposed view would be stored scrambled
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, partial, dict(metadata))
        with partial.open("rb+") as f:
            os.fsync(f.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path, use: Callable[[Any], Any]) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as f:
            return use(f)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} cannot be read as a safetensors file ({error}): it is damaged or another format"
        ) from error
