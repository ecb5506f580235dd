"""A source of weights as a checkpoint: checked, widened where needed, and written with its vocabulary."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from numpy_gpt.errors import InputError
from numpy_gpt.io.files import replacing
from numpy_gpt.io.folders import new_folder
from numpy_gpt.parameters import check_shapes
from numpy_gpt.tokenizer import get_encoding, vocabulary_sha256
from numpy_gpt.weights.checkpoint import save_params
from numpy_gpt.weights.source import Source

if TYPE_CHECKING:
    import tiktoken

    from numpy_gpt.console import Report


def import_weights(source: Source, path: Path, out: Path, report: "Report") -> "tiktoken.Encoding | None":
    """Write the checkpoint folder `out` of the source found at path; return the encoding that came along, if any.

    The weights keep their values: float64 if any tensor is, else float32. Nothing is written unless everything fits.
    Raises InputError, naming path and tensor, for a shape, dtype or value that no GPT-2 of this configuration has, for
    an unusable vocabulary, and if `out` exists or cannot be written.
    """
    try:
        check_shapes(source.config, {name: tensor.shape for name, tensor in source.tensors.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for name, tensor in source.tensors.items():
        if tensor.dtype.kind != "f":
            tensor.read()  # a tensor that cannot be read raises its own error first
            raise InputError(f"{path}: {name} is {tensor.dtype}, and weights are floating-point numbers: it is damaged")
    dtype = np.float64 if any(tensor.dtype == np.float64 for tensor in source.tensors.values()) else np.float32
    tensors = {name: tensor.astype(dtype).finite(path, name) for name, tensor in source.tensors.items()}
    about = {"encoding": source.encoding or "."}
    encoding: tiktoken.Encoding | None = None
    if source.vocabulary:
        from numpy_gpt.encodings.own import own_encoding  # here, since it loads tiktoken

        encoding = own_encoding(source.vocabulary, str(path))  # raises before anything is written
        about["vocabulary"] = vocabulary_sha256(source.vocabulary)
    elif source.encoding:
        encoding = get_encoding(source.encoding)
    with new_folder(out) as folder:
        try:
            for name, content in source.vocabulary.items():
                with replacing(folder / name) as beside:
                    beside.write_bytes(content)
        except OSError as error:
            raise InputError(f"cannot write into {out}: {error.strerror or error}; choose another --out") from error
        params = {name: tensors[name].read() for name in report.track(list(tensors), "reading")}
        save_params(source.config, params, folder, about=about)
    return encoding
