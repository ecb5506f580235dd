"""GPT-2 in other programs' formats."""

import torch
from click.testing import CliRunner

from torch_gpt.cli import main as torch_main


def run_torch(*args, code=0):
    result = CliRunner().invoke(torch_main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


def named(tensors):
    """The tensors under transformers' names."""
    return {name if name == "lm_head.weight" else f"transformer.{name}": array for name, array in tensors.items()}


def mingpt_state(tensors):
    """minGPT's state_dict: torch's layout, causal masks, and an untied head."""
    turned = {n: torch.from_numpy((a.T if a.ndim == 2 and n[0] == "h" else a).copy()) for n, a in tensors.items()}
    state = named(turned)
    return state | {f"transformer.h.{i}.attn.bias": torch.ones(6, 6).tril().view(1, 1, 6, 6) for i in range(2)}
