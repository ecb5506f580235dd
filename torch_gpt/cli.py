"""The command torch-gpt."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import torch

from numpy_gpt.cli.evaluate import evaluate_options, run_evaluate
from numpy_gpt.cli.flags import AT_LEAST_1, PATH, options
from numpy_gpt.cli.generate import Continue, Decoding, generate_options, run_generate
from numpy_gpt.cli.main import Commands
from numpy_gpt.cli.pretrain import pretrain_options, run_pretrain
from numpy_gpt.cli.weights import bring_in
from numpy_gpt.errors import InputError
from numpy_gpt.runs.pretrain import MakeLearner
from numpy_gpt.typing import Array
from numpy_gpt.weights.checkpoint import load_params
from torch_gpt.chapter5 import answer
from torch_gpt.decoding import stream
from torch_gpt.explore import write_pass
from torch_gpt.model import Attention, GPTModel, from_params
from torch_gpt.processes import Parallel, Team
from torch_gpt.train import DTYPES, TorchLearner, check_compiler, check_dtype, choose_device
from torch_gpt.weights import read_pth


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="numpy-gpt")
def main() -> None:
    """The reference of numpy-gpt: the same job in PyTorch, on the CPU or a GPU."""


DEVICE = click.option(
    "--device", default=None, metavar="NAME", help="cuda, mps or cpu.  [default: the first one available]"
)
ATTENTION = click.option(
    "--attention",
    type=click.Choice(get_args(Attention)),
    default="sdpa",
    show_default=True,
    help="Separate matrix products, or scaled_dot_product_attention.",
)
inference_options = options(
    DEVICE,
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="bfloat16 is autocast over float32.  [default: the checkpoint's]"
    ),
    ATTENTION,
)


@main.command("pretrain", short_help="Train a GPT on a text, in PyTorch.")
@pretrain_options
@DEVICE
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="bfloat16 is autocast.")
@ATTENTION
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile (needs a C++ compiler on the CPU).")
@click.option(
    "--parallel",
    type=click.Choice(get_args(Parallel)),
    default="ddp",
    show_default=True,
    help="Processes share each batch; with fsdp also parameters, gradients and optimiser state.",
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
    srun. Rank 0 prints and writes. Without dropout the run is that of one process.
    """
    chosen = choose_device(device)
    check_dtype(dtype, chosen)
    if compiled:
        check_compiler(chosen)
    how: dict[str, Any] = {"device": chosen, "dtype": dtype, "attention": attention, "compiled": compiled}
    options = f"{dtype} · attention {attention}" + (" · compiled" if compiled else "")
    learner: MakeLearner = partial(TorchLearner, **how)
    if team is not None and (team.place.size > 1 or parallel == "fsdp"):
        if chosen.type == "cuda":
            team.check_gpus()
        from torch_gpt.parallel import TeamLearner  # torch.distributed's modules take a second to import

        learner = partial(TeamLearner, team=team, parallel=parallel, **how)
        options += f" · {team.place.size} process{'es' * (team.place.size > 1)} ({parallel})"
    elif parallel == "fsdp":
        raise InputError("--parallel fsdp shares the model among processes: start them with torchrun or srun")
    if compiled:
        options += "\ncompiling takes a minute or more, before the first step and before the first evaluation"
    processes = 1 if team is None else team.place.size
    run_pretrain(learner, f"torch-gpt · PyTorch {torch.__version__} · {chosen} · {options}", flags, processes)


def load_model(checkpoint: Path, device: str | None, dtype: str | None, attention: Attention) -> GPTModel:
    """The checkpoint's model without dropout; dtype: one of DTYPES, or None for the checkpoint's."""
    chosen = choose_device(device)
    config, params = load_params(checkpoint)
    dtype = dtype or params["tok_emb.weight"].dtype.name
    check_dtype(dtype, chosen)
    precision = torch.float64 if dtype == "float64" else torch.float32
    model = from_params(config, params, attention=attention, device=chosen, dtype=precision)
    if dtype == "bfloat16":
        model.forward = torch.autocast(chosen.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    return model.eval()


@main.command("evaluate", short_help="Loss and perplexity on a text, in PyTorch.")
@evaluate_options
@inference_options
def evaluate_command(device: str | None, dtype: str | None, attention: Attention, **flags: Any) -> None:
    """Loss and perplexity of CHECKPOINT on a text: `numpy-gpt evaluate` in PyTorch, with the same output."""

    def load_loss(checkpoint: Path) -> Callable[[Array, Array], float]:
        model = load_model(checkpoint, device, dtype, attention)
        where = model.tok_emb.weight.device

        def loss(x: Array, y: Array) -> float:
            with torch.no_grad():
                return model.loss(torch.as_tensor(x, device=where), torch.as_tensor(y, device=where)).item()

        return loss

    run_evaluate(load_loss, **flags)


@main.command("generate", short_help="Continue a prompt, in PyTorch.")
@generate_options
@inference_options
def generate_command(device: str | None, dtype: str | None, attention: Attention, **flags: Any) -> None:
    """Continue PROMPT: `numpy-gpt generate` in PyTorch, with the same output.

    With the same seed, the draws are the same too, on every device. As in the book, each token recomputes the full
    window.
    """

    def load_continue(checkpoint: Path, d: Decoding) -> Continue:
        model = load_model(checkpoint, device, dtype, attention)
        generator = torch.Generator().manual_seed(d.seed)

        def new_ids(ids: Array) -> Iterator[int]:
            tokens = torch.as_tensor(ids[None], device=model.tok_emb.weight.device)
            columns = stream(
                model, tokens, d.max_new_tokens, d.temperature, d.top_k, d.top_p, d.eos_id, generator, d.n_vocab
            )
            return (int(column) for column in columns)

        return new_ids

    run_generate(load_continue, **flags)


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
