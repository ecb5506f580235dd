"""A run's folder: created, locked, resumed, saved into."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.io.files import lock, remove, replacing, sweep_folder, unlock, written
from numpy_gpt.io.folders import check_free, taken
from numpy_gpt.io.paths import is_file, is_folder, kind_of
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.losses import Losses
from numpy_gpt.runs.saves import (
    BEST,
    CHECKPOINT,
    RUN_FILE,
    check_about,
    copy_kept,
    copy_newest,
    kept_saves,
    own_folder,
)
from numpy_gpt.runs.settings import ADDED, MAY_CHANGE, Settings, check_settings, effective
from numpy_gpt.runs.texts import in_words, names_of
from numpy_gpt.tokenizer import ENCODINGS
from numpy_gpt.train import Learner, Position
from numpy_gpt.typing import Params
from numpy_gpt.weights.checkpoint import MODEL_FILE, load_training, read_header, save_params

VOCABULARY = "vocabulary"
"""The run's subfolder for the two files of an encoding without a built-in name."""


class Validation(NamedTuple):
    """The loss of the weights in nats per token, over the first `batches` batches of the validation text."""

    loss: float
    batches: int


class Run:
    """A run's folder. `settings` are those it was started with; nothing is written before `create`."""

    def __init__(self, folder: Path, settings: Settings, save: Path | None = None):
        """save: the folder of the save to resume from; default: the newest, checkpoint."""
        self.folder, self.settings = folder, settings
        self._save = save or folder / CHECKPOINT
        self.losses = Losses(folder)

    @classmethod
    @contextmanager
    def create(cls, folder: Path | None, settings: Settings, batches: Batches) -> Iterator["Run"]:
        """Create a run, locked against other processes until the block ends.

        folder must be new or empty; None: runs/MODEL-TEXT-N with the first free N. Otherwise raises InputError and
        changes nothing.
        """
        for place in _numbered_folders(settings) if folder is None else [folder]:
            with ExitStack() as held:
                try:
                    cls.check_new(place)
                    held.enter_context(taken(place))
                except InputError:
                    if folder is None and os.path.lexists(place):
                        continue  # another process was faster
                    raise
                run = cls(place, settings)
                run._begin(batches)
                yield run
                return

    @staticmethod
    def check_new(folder: Path) -> None:
        """Raise InputError unless a run can be created in folder."""
        if is_file(folder / RUN_FILE):
            raise InputError(_already(folder))
        check_free(folder)

    def _begin(self, batches: Batches) -> None:
        made = [self.folder / RUN_FILE, self.losses.file, self.folder / VOCABULARY]
        try:
            with written(self.folder):
                try:
                    made[0].open("x").close()  # decides which process gets the folder where locks are unavailable
                except FileExistsError as error:
                    made = []
                    raise InputError(_already(self.folder)) from error
            self._write_settings(batches.sha256)
            self.losses.write([])
            if batches.vocabulary:
                with written(made[2]):
                    made[2].mkdir()
                    for name, content in batches.vocabulary.items():
                        (made[2] / name).write_bytes(content)
        except BaseException:
            for path in reversed(made):  # run.json last: until then the rest still reads as a run without a save
                remove(path)
            raise

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open the run in folder, or the run that folder is a save of. Raises InputError if it is neither."""
        if not is_file(folder / RUN_FILE) and is_file(folder.absolute().parent / RUN_FILE):
            run = cls.open(folder.absolute().parent)
            if kind_of(folder) == "missing":
                found = [CHECKPOINT, *(each.name for _, each in sorted(kept_saves(run.folder).items()))]
                raise InputError(f"{folder} does not exist: the saves of this run are {', '.join(found)}")
            return cls(run.folder, run.settings, folder)
        if kind_of(folder) == "missing":
            raise InputError(f"{folder} does not exist: give the folder of a run, or of a save in one")
        try:
            values = read_json(folder / RUN_FILE)
            known = {name: getattr(Settings(), name) for name in ADDED} | values["settings"]
            lists = {name: tuple(value) for name, value in known.items() if type(value) is list}
            settings = Settings(**{field.name: (known | lists)[field.name] for field in fields(Settings)})
            if unknown := values["settings"].keys() - {field.name for field in fields(Settings)}:
                raise ValueError(f"this release does not know its setting {min(unknown)!r:.80}")
            unchanged = values["sha256"] == _sha256(values["settings"], values["text_sha256"])
            check_settings(settings)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{folder} is not the folder of a run (no usable run.json: {error}): give one made by pretrain"
            ) from error
        if not unchanged:
            raise InputError(
                f"{folder / RUN_FILE} was changed since it was written (its SHA-256 differs): restore it, and give "
                "other settings as flags"
            )
        if settings.encoding not in ENCODINGS and is_folder(folder / VOCABULARY):
            settings = replace(settings, encoding=str((folder / VOCABULARY).resolve()))  # wherever the run is by now
        return cls(folder, settings)

    @property
    def text_sha256(self) -> str:
        """Batches.sha256 (text and vocabulary) at the start of the run."""
        return str(read_json(self.folder / RUN_FILE)["text_sha256"])

    @property
    def to_resume(self) -> Path:
        """The folder of the save to resume from. Raises InputError if there is none yet.

        If checkpoint is missing (a kill while a link of that name was being replaced), this is the newest kept save.
        """
        if is_file(self._save / MODEL_FILE) or self._save.name != CHECKPOINT:
            return self._save
        try:
            saves = kept_saves(self.folder)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be read ({error.strerror}): try again") from error
        if not saves:
            raise InputError(
                f"{self.folder} ended before its first save: start it again with another --out, or delete it"
            )
        return saves[max(saves)]

    def saved_state(self, settings: Settings, text_sha256: str) -> tuple[Position, Params]:
        """The position at which the save ended, and the state to restore. Writes nothing: `resume` does.

        settings: the run's own, except those in MAY_CHANGE. Raises InputError if others, or the text, differ.
        """
        changed = [name for name, value in asdict(self.settings).items() if value != getattr(settings, name)]
        if text_sha256 != self.text_sha256:
            what = f"{in_words(settings.text)} (or the vocabulary) is not the text"
            if settings.tokens is not None:
                what = f"{settings.tokens} (or the vocabulary) does not have the tokens"
            raise InputError(
                f"{what} that {self.folder} was started with: restore the old one, or start another run with "
                f"--init {self.folder}"
            )
        for name in changed:
            if name not in MAY_CHANGE and effective(settings, name) != effective(self.settings, name):
                raise InputError(
                    f"{self.folder} was started with --{name.replace('_', '-')} {effective(self.settings, name)}, "
                    f"not {effective(settings, name)}: leave it out to resume, or start another run with "
                    f"--init {self.folder}"
                )
        if self._save.name == BEST and not any(self._save.glob("training-*")):
            raise InputError(
                f"{self._save} is a model without a training state: resume the run with --resume {self.folder}, or "
                f"start another run from it with --init {self._save}"
            )
        state = load_training(self.to_resume)
        position = Position.restored(state)
        check_about(self.to_resume, position.step)
        return position, state

    def resume(self, settings: Settings, text_sha256: str, position: Position, keep: int) -> list[str]:
        """Continue the run from this position, with these settings; returns what `save` returns.

        An earlier save first becomes the checkpoint; then later rows of losses.csv are removed. Finishes what a kill
        interrupted after the last save: copying it, or updating the best.
        """
        for place in (self.folder, self.folder / CHECKPOINT, self.folder / BEST):
            sweep_folder(place)
        notes: list[str] = []
        if self.to_resume.resolve() != (self.folder / CHECKPOINT).resolve():
            notes += self._keep_newest()
            with written(self.folder):
                newest = own_folder(self.folder, CHECKPOINT)
                newest.mkdir(exist_ok=True)
                for name in (read_header(self.to_resume).about["training"], MODEL_FILE):  # the model last: it commits
                    with replacing(newest / name) as beside:
                        shutil.copyfile(self.to_resume / name, beside)
        rows = [row for row in self.losses.read() if row["step"] < position.step]
        self.settings = settings
        self._write_settings(text_sha256)
        self.losses.write(rows)
        return notes + copy_newest(self.folder, keep)

    def _keep_newest(self) -> list[str]:
        """Keep the checkpoint as checkpoint-STEP, if readable, before an earlier save replaces it.

        Raises InputError if that name is in use.
        """
        try:
            about = read_header(self.folder / CHECKPOINT).about
            step = int(about["step"])
        except (InputError, KeyError, ValueError):
            return []
        with written(self.folder):
            if notes := copy_kept(self.folder, about, keep=2):
                raise InputError(f"{notes[0]}: move it away, or resume the newest save with --resume {self.folder}")
        return [f"the newest save, of step {step}, stays as {CHECKPOINT}-{step:06d}; best and later saves stay too"]

    def best_batches(self, eval_iter: int) -> int:
        """The number of validation batches that saves are compared over: the best save's, or eval_iter without one."""
        try:
            return max(1, int(read_header(self.folder / BEST).about["val_batches"]))
        except (InputError, KeyError, ValueError):
            return eval_iter

    def save(
        self,
        config: GPTConfig,
        learner: Learner,
        position: Position,
        batches: Batches,
        validation: Validation,
        keep: int = 1,
    ) -> list[str]:
        """Write the checkpoint, then update the copies of the last `keep` saves, and best.

        checkpoint is replaced atomically. With keep above 1, checkpoint-STEP is a copy of it next to the earlier ones.
        best is the saved model with the lowest validation loss (`validation` is that of the weights being saved). No
        save shares files with another. Returns a sentence for each copy that could not be made or judged, which ends
        no run. Raises InputError if the checkpoint cannot be written.
        """
        encoding = self.settings.encoding
        about = {
            "encoding": encoding if encoding in ENCODINGS else f"../{VOCABULARY}",
            **batches.about,
            "step": str(position.step),
            "val_loss": repr(validation.loss),
            "val_batches": str(validation.batches),
        }
        if batches.vocabulary_sha256 is not None:
            about["vocabulary"] = batches.vocabulary_sha256
        training = learner.state() | position.state()
        save_params(config, learner.params(), own_folder(self.folder, CHECKPOINT), training=training, about=about)
        return copy_newest(self.folder, keep)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes. Raises InputError if another is training in it.

        Does nothing where the system (Windows) or the file system lacks such locks.
        """
        try:
            held = lock(self.folder)
        except BlockingIOError as error:
            raise InputError(f"another process is training in {self.folder}: wait for it, or stop it") from error
        except OSError as error:
            raise InputError(f"{self.folder} cannot be used ({error.strerror}): try again") from error
        try:
            yield
        finally:
            unlock(held)

    def _write_settings(self, text_sha256: str) -> None:
        settings = asdict(self.settings)
        values = {"settings": settings, "text_sha256": text_sha256, "sha256": _sha256(settings, text_sha256)}
        with written(self.folder), replacing(self.folder / RUN_FILE) as beside:
            beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _sha256(settings: dict[str, Any], text_sha256: str) -> str:
    return hashlib.sha256(json.dumps([settings, text_sha256], sort_keys=True).encode()).hexdigest()


def _already(folder: Path) -> str:
    if is_file(folder / CHECKPOINT / MODEL_FILE):
        return f"{folder} already holds a run: resume it with --resume {folder}, or choose another --out"
    return f"{folder} already holds a run without a save: if it has ended, delete it, or choose another --out"


def _numbered_folders(settings: Settings) -> Iterator[Path]:
    """runs/MODEL-TEXT-N for N = 1, 2, …: the candidates for a run without --out."""
    learned = Path(settings.tokens or names_of(settings.text)[0]).stem[:60]
    for number in count(1):
        yield Path("runs", f"{settings.name}-{learned}-{number}")
