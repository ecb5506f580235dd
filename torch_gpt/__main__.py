"""python -m torch_gpt is torch-gpt."""

from torch_gpt.cli import main

main(prog_name="torch-gpt")
