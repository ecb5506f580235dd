"""Files crafted to take many times their size in memory, and a measurement of reading them.

`python -m parity_tests.tools.crafted FOLDER SIZE` writes each file, reads it in this fresh process, and prints JSON:
the file's name -> [its bytes, the bytes by which the process grew, the answer].
"""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import VOCABULARY_TIMES, read_json
from numpy_gpt.runs.folder import Run
from numpy_gpt.runs.losses import COLUMNS
from numpy_gpt.runs.settings import for_tiny
from numpy_gpt.weights.tensorflow.bundle import read_bundle
from numpy_gpt.weights.tensors import read_tensors
from parity_tests.judge.bundles import write as write_bundle

EMPTY = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def headers(size: int) -> dict[str, str]:
    """Safetensors headers of about `size` bytes each."""

    def many(what: str) -> str:
        return ",".join(what % k if "%" in what else what for k in range(size // (len(what) + 5)))

    axes = '{"t":{"dtype":"F32","shape":[' + ",".join(["1"] * (size // 2)) + '],"data_offsets":[0,4]}}'
    return {
        "empty tensors": "{" + many(EMPTY) + "}",
        "axes": axes,
        "metadata keys": '{"__metadata__":{' + many('"%d":""') + "}}",
        "one long value": '{"__metadata__":{"a":"' + "x" * size + '"}}',
        "one wide value": '{"__metadata__":{"a":"' + "x" * size + '\\ud83d\\ude00"}}',
        "escapes": '{"__metadata__":{"a":"' + "\\n" * (size // 2) + '"}}',
        "a long number": '{"t":{"dtype":"F32","shape":[' + "9" * size + '],"data_offsets":[0,4]}}',
        "nesting": '{"t":' + "[" * size,
    }


def jsons(size: int) -> dict[str, str]:
    """JSON objects of about `size` bytes each."""
    return {
        "empty lists": '{"a":[' + ",".join(["[]"] * (size // 3)) + "]}",
        "nested lists": '{"a":[' + ",".join(["[[[[[]]]]]"] * (size // 11)) + "]}",
        "nested objects": '{"a":[' + ",".join(['{"a":{"a":{}}}'] * (size // 15)) + "]}",
        "numbers": '{"a":[' + ",".join(["257"] * (size // 4)) + "]}",
        "one wide string": '{"a":"' + "x" * size + '😀"}',
        "a long number": '{"a":' + "9" * size + "}",
        "deep nesting": '{"a":' + "[" * size + "]" * size + "}",
        "white space": "{" + " " * size + "}",
    }


def files(folder: Path, size: int) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Name of a crafted file -> the file and its reader."""
    found: dict[str, tuple[Path, Callable[[Path], object]]] = {}
    for name, text in headers(size).items():
        file = folder / f"{name}.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4 * ("axes" in name)))
        found[file.name] = file, read_tensors
    for name, text in jsons(size).items():
        file = folder / f"{name}.json"
        file.write_text(text, encoding="utf-8")
        found[file.name] = file, read_json
    for name in ("empty lists", "nested lists"):
        found[f"{name} as a vocabulary"] = folder / f"{name}.json", lambda file: read_json(file, VOCABULARY_TIMES)
    for name, row in {"rows": "1" + ",1" * 7 + "\n", "columns": "," * 99_999}.items():
        (run := folder / name).mkdir()
        (run / "losses.csv").write_text(",".join(COLUMNS) + "\n" + row * (size // len(row)))
        found[f"losses.csv of many {name}"] = run / "losses.csv", lambda file: Run(file.parent, for_tiny).losses.read()
    (bundle := folder / "bundle").mkdir()
    prefix = write_bundle(bundle, {str(k): ("float32", (0,), b"") for k in range(size // 60)})
    found["an index of empty tensors"] = Path(f"{prefix}.index"), lambda file: read_bundle(file.with_suffix(""))
    return found


def grown(read: Callable[[Path], object], file: Path) -> tuple[int, str]:
    """Read a file: the bytes by which this process grew at its peak, and the answer."""

    def kilobytes(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kilobytes("VmRSS")
    try:
        read(file)
        answer = "read"
    except InputError as error:
        answer = f"InputError: {error}"
    except Exception as error:  # a fault: reported by the test
        answer = f"{type(error).__name__}: {error}"
    return 1024 * (kilobytes("VmHWM") - before), answer


def main(folder: Path, size: int) -> None:
    """Read crafted files of about `size` bytes one by one, and print the results."""
    found = {}
    for name, (file, read) in files(folder, size).items():
        bytes_of = sum(member.stat().st_size for member in file.parent.iterdir()) if "bundle" in str(file) else 0
        found[name] = [bytes_of or file.stat().st_size, *grown(read, file)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
