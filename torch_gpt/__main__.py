"""python -m torch_gpt is torch-gpt."""

import sys


def main() -> None:
    """The command torch-gpt; without torch one line that says so, and exit code 2."""
    try:
        from torch_gpt.cli import main as command
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print("torch-gpt needs PyTorch: pip install 'numpy-gpt[torch]'", file=sys.stderr)
        raise SystemExit(2) from None
    command(prog_name="torch-gpt")


if __name__ == "__main__":
    main()
