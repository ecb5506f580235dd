"""Helpers that run the pretrain commands on a short text and check their refusals."""

import csv

from click.testing import CliRunner

from numpy_gpt import GPT, GPTConfig, save

SMALL = ["--context-length", "16", "--batch-size", "4", "--stride", "16", "--eval-freq", "2", "--eval-iter", "2"]


def invoke(command, *args):
    return CliRunner().invoke(command, [str(a) for a in args])


def pretrain(command, text, out, *args):
    result = invoke(command, "pretrain", "--text", text, "--out", out, *SMALL, *args)
    assert result.exit_code == 0, result.output
    return result.output


def rows(out):
    with (out / "losses.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def snapshot(place):
    return {p: p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def check_refused(result, message):
    assert result.exit_code == 2, result.output
    assert message in result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in result.output
    assert result.stdout == "", "a refused command must print nothing to stdout"


def saved(folder):
    save(GPT(GPTConfig(7, 4, emb_dim=8, n_heads=2, n_layers=1)), folder)
