"""python -m parity_tests: commands that measure, break and judge beyond the test suite."""

import sys
from pathlib import Path

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table

from numpy_gpt.cli.main import Commands
from numpy_gpt.errors import install
from numpy_gpt.io.outermost import optional_output, say

PAGE = Path(__file__).parent / "museum.md"


def can_be_written(ctx, param, path):
    """Check before any work that the path of a file or folder can be written, and return it."""
    if path is None:
        return None
    try:
        if param.type.file_okay:
            path.open("a").close()
        else:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be written: {error.strerror}", ctx, param) from error
    return path


class Bench(Commands):
    """A command group that ends with one line and exit code 2 if a package it needs is not installed."""

    def invoke(self, ctx):  # inside the outermost handler, which would report a bug
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name not in ("google_crc32c", "hypothesis", "playwright", "pytest", "tokenizers", "torch"):
                raise
            say(f"parity_tests needs {error.name}: {install('test')}")
            raise SystemExit(2) from None


@click.group(cls=Bench, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """Measure numpy_gpt's errors, put deliberate faults into it, and judge your own operations."""


@main.command(short_help="Apply every known fault and show the test that finds it.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=can_be_written,
    metavar="FILE",
    help=f"Also write the page; the committed one is parity_tests/{PAGE.name}.",
)
def museum(out):
    """Apply the museum's faults to numpy_gpt one by one, and see which test fails.

    Also shows the result of a naive check (weights times 0.02, atol 1e-4, the gradient of .sum()) for the same fault.
    Takes two to five minutes. Exit code 1 if a fault goes unnoticed.
    """
    from parity_tests import profiles

    profiles.load(expect_failure=True)  # before the tests are imported
    from parity_tests.tools.exhibition import exhibit, page
    from parity_tests.tools.museum import FAULTS

    if out is not None:
        optional_output()
    console = Console()
    shown = [exhibit(fault) for fault in track(FAULTS, "faults", console=Console(stderr=True))]
    table = Table(*(Column(name, overflow="fold") for name in ("fault", "naive check", "found by")))
    for exhibited in shown:
        found = exhibited.killed_by.rpartition("::")[2] if exhibited.killed_by else "[bold red]nothing[/]"
        colour = "green" if exhibited.naive_is_green else "red"
        table.add_row(escape(str(exhibited.fault)), f"[{colour}]{exhibited.naive}[/]", found)
    console.print(table)
    if out is not None:
        out.write_text(page(shown), encoding="utf-8")
    missed = [str(exhibited.fault) for exhibited in shown if exhibited.killed_by is None]
    green = sum(exhibited.naive_is_green for exhibited in shown)
    console.print(f"{len(shown)} faults: found {len(shown) - len(missed)}; the naive check, {len(shown) - green}.")
    if missed:
        sys.exit(f"not found: {', '.join(missed)}")


@main.command(short_help="The error of every result.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    callback=can_be_written,
    default="parity-report",
    show_default=True,
    metavar="DIR",
)
@click.option("--all", "everything", is_flag=True, help="Print every row, not only the worst of each tensor.")
@click.option("--quick", is_flag=True, help="Measure only a few cases, in seconds.")
def report(out, everything, quick):
    """Measure the error of every result: NumPy's and torch's, and the share of the budget used.

    Covers every operation and complete models, by dtype, depth, T and the weights' scale. The table shows the worst
    case of each tensor, by ratio in float32 and by share of the budget in float64. Errors are relative to the tensor's
    largest number; "budget" is the used share of what the suite allows. In float64, NumPy's error is its distance from
    torch, and torch's is that between its two attentions: a deep model with weights of scale 3 is so badly conditioned
    that both exceed the budget. Writes report.json (every row) and report.png (how errors grow with depth and with T).
    Takes half a minute.
    """
    from parity_tests.judge.progress import counted, shown
    from parity_tests.tools.report import DTYPES, cases, draw, float32_rule, machine, sort, worst_rows, write_json

    optional_output()  # the rows are in report.json
    console, rows = Console(), []
    for measure, case in shown(cases(quick), "measuring", sort):
        rows += measure(*case)
    with counted("measuring the float32 rule"):
        rule = float32_rule(quick)
    printed = rows if everything else worst_rows(rows)
    for dtype in DTYPES:
        table = Table(dtype, "layers", "T", "scale", "NumPy", "torch", "ratio", "budget", box=SIMPLE, padding=0)
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for row in printed:
            numbers = zip((row.numpy, row.torch, row.ratio, row.share), (".1e", ".1e", ".2f", ".1e"), strict=True)
            texts = ["" if x is None else f"{x:{form}}" for x, form in numbers]
            if row.dtype == dtype:
                name = f"{row.operation}.{row.tensor}"
                table.add_row(name, str(row.depth or ""), str(row.T), f"{row.scale:g}", *texts)
        console.print(table)
    title = (
        "too few cases for the float32 rule: 95th percentile" if quick else "float32 rule (at most 2): 95th percentile"
    )
    table = Table(f"{title} of NumPy's error / torch's", *rule, box=SIMPLE)
    for kind in sorted(rule["dropout 0"], key=lambda kind: -rule["dropout 0"][kind]):
        table.add_row(escape(kind), *(f"{percentiles[kind]:.2f}" for percentiles in rule.values()))
    console.print(table)
    write_json(out / "report.json", rows, rule)
    draw(out / "report.png", rows)
    console.print(f"{machine()}\n{out / 'report.json'}, {out / 'report.png'}")


class WithSignatures(click.Command):
    """A command whose help ends with the signatures of the functions that can be judged."""

    def format_epilog(self, ctx, formatter):
        from parity_tests.tools.student import signatures

        with formatter.section("The functions of FILE (shapes and results: numpy_gpt/plain.py)"):
            for signature in signatures():
                formatter.write_text(signature)


@main.command(cls=WithSignatures, short_help="Judge operations that you wrote.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check(file):
    """Judge your own operations: FILE.py defines any of the functions in numpy_gpt.ops, under the same names.

    numpy_gpt/plain.py is such a file: textbook code that you may copy and change.

    Each function replaces ours; every output and gradient is compared with torch's on hundreds of cases in float64 and
    float32, within the same budget. A failure shows the first wrong tensor, the index, both values, the smallest
    failing case, a possible cause, and at the end a few lines of Python that reproduce it. A backward without its
    forward gets our forward's cache; a forward without its backward is judged by its output alone. Progress goes to
    stderr. Exit code 1 if anything is wrong.

    The file is executed, so use only one that you trust.
    """
    from parity_tests import profiles

    profiles.load(expect_failure=True)
    from parity_tests.judge.progress import counted
    from parity_tests.tools.student import judge_file

    console, wrong = Console(), []

    def tell(line):
        console.print(escape(line), highlight=False, soft_wrap=True)

    try:
        for verdict in judge_file(file, tell, counted):
            name = f"[bold]{verdict.operation}[/] ({', '.join(verdict.functions)})"
            if verdict.wrong is None:
                sizes = ", ".join(f"{axis} ≤ {most}" for axis, most in verdict.sizes.items())
                console.print(f"{name}: [green]matches torch[/] in {verdict.cases} cases: {sizes}", soft_wrap=True)
                continue
            wrong.append(verdict)
            console.print(f"{name}: [red]wrong[/]")
            tell(f"  {verdict.wrong}")
            tell(f"  smallest case: {verdict.case}")
            if verdict.hint:
                tell(f"  perhaps: {verdict.hint}")
            if verdict.seen:
                tell(f"  seen in: {verdict.seen}")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for verdict in wrong:
        tell(f"\n# {verdict.operation}: the smallest case as Python\n{verdict.code}")
    sys.exit(1 if wrong else 0)


@main.command(short_help="Feed damaged files to every reader.")
@click.option("--mutants", type=click.IntRange(min=1), default=100_000, show_default=True, help="Files per reader.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.argument("readers", nargs=-1, metavar="[checkpoint|openai|huggingface|run|pth|vocabulary]...")
def fuzz(mutants, seed, readers):
    """Damage the files of a small model, one change at a time, and feed them to the readers: all, or those named.

    In formats of weights, a quarter of the mutants each are damaged in a header, an index, the data, the configuration;
    in runs, in the checkpoint's metadata, its training state, run.json, losses.csv. Half of them get valid checksums
    again. Every answer must be one clear error, or what an independent reader finds in the mutant, within two and a
    half times the files' size in memory (or the fixed allowance for short files). Takes about ten minutes per reader on
    two cores. Exit code 1 otherwise; the line printed says how to reproduce the mutant.
    """
    from concurrent.futures import as_completed

    from parity_tests.judge.progress import workers
    from parity_tests.tools.fuzz import SPECIMENS, Findings, fuzz_part

    if unknown := set(readers) - SPECIMENS.keys():
        raise click.UsageError(f"no reader {min(unknown)}: choose from {', '.join(SPECIMENS)}")
    console, part = Console(), 2000
    sizes = [min(part, mutants - start) for start in range(0, mutants, part)]
    found = {reader: Findings() for reader in readers or SPECIMENS}
    with workers() as pool:
        jobs = {
            pool.submit(fuzz_part, reader, size, seed + k): reader for reader in found for k, size in enumerate(sizes)
        }
        for job in track(as_completed(jobs), "mutants", total=len(jobs), console=Console(stderr=True)):
            found[jobs[job]].add(job.result())
    table = Table("", *found, box=SIMPLE)
    for place in dict.fromkeys(place for findings in found.values() for place in findings.errors + findings.loaded):
        tried = ((findings.errors[place], findings.loaded[place]) for findings in found.values())
        counts = (f"{errors:,} errors, {loaded:,} load" if errors or loaded else "" for errors, loaded in tried)
        table.add_row(f"damaged in {place}", *counts)
    table.add_row("slowest answer", *(f"{findings.slowest:.2f} s" for findings in found.values()))
    table.add_row("largest memory", *(f"{findings.largest:.2f} × files" for findings in found.values()))
    table.add_row("faults", *(str(len(findings.faults)) for findings in found.values()))
    console.print(table)
    faults = [f"{reader}: {fault}" for reader, findings in found.items() for fault in findings.faults]
    for fault in faults[:20]:
        console.print(escape(fault), highlight=False, soft_wrap=True)
    sys.exit(1 if faults else 0)


@main.command(short_help="kill -9 at random instants of a training run.")
@click.option("--trials", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def kills(trials, seed):
    """Kill a training run that saves after every step, check what is left, and resume it.

    Each kill must leave a complete checkpoint, and the resumed run must match an uninterrupted one bit for bit:
    parameters, optimiser, random state and losses. Some runs are killed again while resuming. Takes about ten minutes
    (needs fork: not on Windows). Exit code 1 at the first difference.
    """
    import tempfile

    from parity_tests.tools.kills import DifferentError, kill_and_resume

    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as place:
        try:
            steps = list(track(kill_and_resume(trials, Path(place), seed), "kills", total=trials, console=console))
        except DifferentError as error:
            sys.exit(str(error))
    print(
        f"{trials} kills, after saves of step {min(steps)} to {max(steps)}: each left a complete checkpoint, and each"
    )
    print("resumed run matched the uninterrupted one, bit for bit")


@main.command("rank-kills", short_help="kill -9 of a random process of a run on several.")
@click.option("--trials", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def rank_kills(trials, seed):
    """Kill one process of a run on two or four, at a random instant, and resume the run on another number.

    The others must end within a minute and name the one that died; the last save must be complete, and the rows of the
    resumed run those of the uninterrupted one. Takes about fifteen minutes. Exit code 1 at the first fault.
    """
    import tempfile

    from parity_tests.tools.rank_kills import DifferentError, kill_ranks

    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as place:
        try:
            took = list(track(kill_ranks(trials, Path(place), seed), "kills", total=trials, console=console))
        except DifferentError as error:
            sys.exit(str(error))
    print(f"{trials} kills: after {max(took):.1f} s at most all processes had ended, and every resumed run gave the")
    print("rows of the uninterrupted one")


@main.command(short_help="Interrupts, errors, signals and races wherever a run writes.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--share", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="One trial in N.")
@click.option("--again", metavar="NAME", help="Repeat one trial, by the name in its reported fault.")
@click.argument("kinds", nargs=-1, metavar="[bytecodes|operations|errors|chains|races]...")
def interrupts(seed, share, again, kinds):
    """Disturb training runs and commands in ways that must not cost a save: all kinds, or those named.

    \b
    bytecodes   1,000 KeyboardInterrupts at random bytecodes inside saves, half of them followed by a second one
    operations  a KeyboardInterrupt after every file operation of a run that saves at each step
    errors      EIO, ENOSPC, EACCES, EINVAL, EROFS at every file operation, once or from then on
    chains      100 chains of one to five signals (kill -9, SIGINT, SIGTERM, SIGHUP, two of them) to resumed runs
    races       520 races of two or three commands started at once

    Each time the saves must load, the resumed run must match an undisturbed one bit for bit, and nothing may be left
    over; in a race one command gets the folder, and the others end with one sentence. Takes an hour on two cores (needs
    fork: not on Windows). Exit code 1 if a trial fails; its line starts with the trial's name.
    """
    from concurrent.futures import as_completed

    from parity_tests.judge.progress import workers
    from parity_tests.tools.interrupts import KINDS, LONG, Findings, do, plan

    if unknown := set(kinds) - KINDS.keys():
        raise click.UsageError(f"no kind {min(unknown)}: choose from {', '.join(KINDS)}")
    if again is not None and again.partition(" ")[0] not in KINDS:
        raise click.UsageError(f"no trial is called {again!r}: give the start of a reported fault, up to the colon")
    console, part, found = Console(), 25, Findings()
    progress = Console(stderr=True)
    if again is not None:
        names = [again]
    else:
        numbers = {kind: LONG[kind] for kind in kinds or KINDS}
        numbers = {kind: n * share if n == 1 else max(1, n // share) for kind, n in numbers.items()}
        with progress.status("looking for the places to disturb"):
            names = [name for kind, number in numbers.items() for name in plan(kind, number, seed)]
    parts = [names[start : start + part] for start in range(0, len(names), part)]
    with workers() as pool:
        jobs = [pool.submit(do, trials) for trials in parts]
        for job in track(as_completed(jobs), "trials", total=len(jobs), console=progress):
            found.add(job.result())
    table = Table("", "trials", "faults", "results", box=SIMPLE)
    for kind in dict.fromkeys(name.partition(" ")[0] for name in names):
        endings = {ending: n for (of, ending), n in sorted(found.endings.items()) if of == kind}
        shown = ", ".join(f"{ending}: {n}" for ending, n in endings.items())
        table.add_row(kind, f"{sum(endings.values()):,}", str(endings.get("fault", 0)), shown)
    console.print(table)
    for fault in found.faults:
        console.print(escape(fault), highlight=False, soft_wrap=True)
    sys.exit(1 if found.faults else 0)


@main.command(short_help="Pictures of numpy-gpt explore's three zooms.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="docs",
    show_default=True,
    callback=can_be_written,
)
@click.argument("checkpoint")
@click.argument("text", default="Every effort moves you forward")
def screenshots(out, checkpoint, text):
    """Take the pictures of docs/: map, tensor and number of CHECKPOINT's pass over TEXT, light and dark.

    Needs Chromium and playwright.
    """
    from parity_tests.tools import pages

    for file in pages.screenshots(checkpoint, text, out):
        print(f"{file} ({file.stat().st_size:,} bytes)")


@main.command(short_help="How long numpy-gpt explore takes to answer.")
@click.option("--gpt2", is_flag=True, help="A new model of GPT-2 124M's size, 32 tokens, in place of CHECKPOINT.")
@click.argument("checkpoint", required=False)
@click.argument("text", default="Every effort moves you")
def waits(gpt2, checkpoint, text):
    """Measure in Chromium: the first picture of CHECKPOINT's pass over TEXT, and the answer to a click.

    Needs Chromium and playwright.
    """
    import tempfile

    from parity_tests.tools import pages

    if gpt2 == (checkpoint is not None):
        raise click.UsageError("give either a CHECKPOINT or --gpt2")
    with tempfile.TemporaryDirectory() as folder:
        file = None
        if gpt2:
            page = pages.gpt2_page()
        else:
            from numpy_gpt.explore.file import write_page

            page, file = pages.page_of(checkpoint, text), Path(folder, "page.html")
            write_page(page, file)
        table = Table("", "seconds", box=SIMPLE)
        for what, seconds in pages.waits(page, file):
            table.add_row(what, f"{seconds:.3f}")
    Console().print(f"{page.ids.tokens.size} tokens", table)


if __name__ == "__main__":
    main(prog_name="python -m parity_tests")
