"""python -m benchmarks"""

import sys

from benchmarks.environment import restart_if_slowed
from numpy_gpt.errors import install

OURS = ("benchmarks", "numpy_gpt", "torch_gpt")


def run() -> None:
    """Run the commands; if a package is not installed, print one line and exit with code 2."""
    try:
        from benchmarks.cli import main  # here, because it loads NumPy and PyTorch

        main(prog_name="python -m benchmarks")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", *OURS):
            raise
        print(f"benchmarks needs {missing}: {install('test')}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    restart_if_slowed()
    run()
