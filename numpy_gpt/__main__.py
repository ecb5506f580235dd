"""python -m numpy_gpt is numpy-gpt."""

from numpy_gpt.cli.main import main

main(prog_name="numpy-gpt")
