"""python -m numpy_gpt.cli is numpy-gpt."""

from numpy_gpt.cli.main import main

main(prog_name="numpy-gpt")
