"""The command torch-gpt."""

from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import torch

from numpy_gpt.cli.flags import AT_LEAST_1, PATH
from numpy_gpt.cli.main import Commands, pretrain_options, run_pretrain
from numpy_gpt.cli.weights import bring_in
from numpy_gpt.errors import InputError
from numpy_gpt.runs.pretrain import MakeLearner
from torch_gpt.chapter5 import answer
from torch_gpt.explore import write_pass
from torch_gpt.model import Attention
from torch_gpt.processes import Parallel, Team
from torch_gpt.train import DTYPES, TorchLearner, check_compiler, check_dtype, choose_device
from torch_gpt.weights import read_pth


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="numpy-gpt")
def main() -> None:
    """The reference of numpy-gpt: the same job in PyTorch, on the CPU or a GPU."""


@main.command("pretrain", short_help="Train a GPT on a text, in PyTorch.")
@pretrain_options
@click.option("--device", default=None, metavar="NAME", help="cuda, mps or cpu.  [default: the first one available]")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="bfloat16 is autocast.")
@click.option(
    "--attention",
    type=click.Choice(get_args(Attention)),
    default="sdpa",
    show_default=True,
    help="Separate matrix products, or scaled_dot_product_attention.",
)
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile (needs a C++ compiler on the CPU).")
@click.option(
    "--parallel",
    type=click.Choice(get_args(Parallel)),
    default="ddp",
    show_default=True,
    help="What several processes share: the batch, or by fsdp the parameters too.",
)
@click.pass_obj
def pretrain_command(
    team: Team | None,
    /,
    device: str | None,
    dtype: str,
    attention: Attention,
    compiled: bool,
    parallel: Parallel,
    **flags: Any,
) -> None:
    """Train a GPT on a text: `numpy-gpt pretrain` in PyTorch, with the same batches and output.

    With the same seed, the initial weights and the order of the batches are the same too, and on the CPU also the
    dropout masks.

    Several processes share each batch of --batch-size windows: torchrun --nproc-per-node 4 -m torch_gpt pretrain …, or
    srun. Rank 0 prints and writes; the run, and its checkpoint, are those of one process.
    """
    chosen = choose_device(device)
    check_dtype(dtype, chosen)
    if compiled:
        check_compiler(chosen)
    how: dict[str, Any] = {"device": chosen, "dtype": dtype, "attention": attention, "compiled": compiled}
    options = f"{dtype} · attention {attention}" + (" · compiled" if compiled else "")
    learner: MakeLearner = partial(TorchLearner, **how)
    if team is not None and (team.place.size > 1 or parallel == "fsdp"):
        from torch_gpt.parallel import TeamLearner  # torch.distributed's modules take a second to import

        learner = partial(TeamLearner, team=team, parallel=parallel, **how)
        options += f" · {team.place.size} processes ({parallel})"
    elif parallel == "fsdp":
        raise InputError("--parallel fsdp shares the model among processes: start them with torchrun or srun")
    if compiled:
        options += "\ncompiling takes a minute or more, before the first step and before the first evaluation"
    processes = 1 if team is None else team.place.size
    run_pretrain(learner, f"torch-gpt · PyTorch {torch.__version__} · {chosen} · {options}", flags, processes)


@main.command("import", short_help="Import PyTorch's weights of a GPT-2.")
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The checkpoint's new folder.")
@click.option("--n-heads", type=AT_LEAST_1, metavar="N", help="Heads, if neither the file nor its width implies them.")
def import_command(file: Path, out: Path, n_heads: int | None) -> None:
    """Convert FILE, written by torch.save, to a checkpoint for numpy-gpt and torch-gpt.

    FILE is a .pth or .pt with the state_dict of the book's GPTModel (alone or as model_state_dict), nanoGPT's ckpt.pt,
    or transformers' pytorch_model.bin with config.json next to it. It is read as data: code in it is refused.
    """
    bring_in(read_pth(file, n_heads), file, out)


@main.command("chapter5", hidden=True)
@click.option("--text", default="the-verdict")
@click.option("--quick", is_flag=True)
def chapter5_command(text: str, quick: bool) -> None:
    """The torch column of `numpy-gpt chapter5`: a figure as JSON for every line on stdin."""
    answer(text, quick)


@main.command("explore", hidden=True)
@click.argument("checkpoint", type=PATH)
@click.option("--parent", type=AT_LEAST_1, required=True, help="The process that asks, and with which this one ends.")
def explore_command(checkpoint: Path, parent: int) -> None:
    """The torch column of `numpy-gpt explore`: tokens and targets on stdin, all activations and gradients to stdout."""
    write_pass(checkpoint, parent)


if __name__ == "__main__":
    main(prog_name="torch-gpt")
