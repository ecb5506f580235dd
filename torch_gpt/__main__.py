"""python -m torch_gpt is torch-gpt."""

from numpy_gpt.io.outermost import outermost, say


def main() -> None:
    """The command torch-gpt; without torch one line that says so, and exit code 2."""
    with outermost():  # a Ctrl-C may come in the seconds that importing torch takes
        try:
            from torch_gpt.cli import main as command
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            say("torch-gpt needs PyTorch: pip install -e '.[torch]'")
            raise SystemExit(2) from None
        command(prog_name="torch-gpt")


if __name__ == "__main__":
    main()
