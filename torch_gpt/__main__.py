"""python -m torch_gpt is torch-gpt."""

import sys
from contextlib import nullcontext
from typing import Any

from numpy_gpt.errors import install
from numpy_gpt.io.outermost import outermost, say


def main() -> None:
    """Run the command torch-gpt; without torch, print one line and exit with code 2."""
    with outermost():  # importing torch takes seconds, in which a Ctrl-C may come
        try:
            from torch_gpt.cli import main as command
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            say(f"torch-gpt needs PyTorch: {install('torch')}")
            raise SystemExit(2) from None
        from torch_gpt.processes import joined

        with joined(sys.argv[1:], _member) if "pretrain" in sys.argv[1:2] else nullcontext() as team:
            command(prog_name="torch-gpt", obj=team)


def _member(*args: Any) -> Any:
    from torch_gpt.parallel import Member  # torch.distributed's modules take a second to import

    return Member(*args)


if __name__ == "__main__":
    main()
