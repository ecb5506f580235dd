"""python -m torch_gpt is torch-gpt."""

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
        command(prog_name="torch-gpt")


if __name__ == "__main__":
    main()
