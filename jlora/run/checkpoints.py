"""The checkpoints of a run: what is in them, whose they are, and how a run resumes from one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.experimental import multihost_utils

from jlora.config import Config, TrainConfig, to_yaml
from jlora.errors import ConfigError, StoppedError
from jlora.io import checkpoint
from jlora.run.progress import Progress
from jlora.run.step_counts import StepCounts
from jlora.training.state import TrainState
from jlora.ui.console import Console

FREE_TO_CHANGE = {
    "model": ("attention",),
    "lora": ("base_model_name_or_path", "revision"),
    "train": (
        "output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "resume",
        "compilation_cache", "check_memory", "full_determinism",
        "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "gradient_checkpointing", "activation_offloading",
        "early_stopping_patience", "early_stopping_threshold", "num_train_epochs", "max_steps",
    ),
}  # fmt: skip
"""Settings that may differ between a checkpoint and the run that resumes from it."""


def identity(config: Config, counts: StepCounts, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint and the run that resumes from it must have in common.

    The batch may be split in another way over devices and micro-batches, and the epochs counted in
    steps: what counts is the number of rows in a step and the number of steps.
    """
    common = fixed_settings(config, "model", "quantization", "lora", "train")
    # With it a checkpoint has one tree more; how much patience there is may change.
    common["train"]["early_stopping"] = bool(config.train.early_stopping_patience)
    plan = {"rows_per_step": counts.rows_per_step, "total_steps": counts.total_steps}
    rows = {"fingerprint": data_fingerprint, "shuffle": config.data.shuffle}
    return {**common, "data": rows, "plan": plan}


def fixed_settings(config: Config, *sections: str) -> dict[str, Any]:
    """The settings in these sections that a resumed run may not change."""
    settings, fixed = yaml.safe_load(to_yaml(config)), {}
    for section in sections:
        fixed[section] = settings.get(section)
        for name in FREE_TO_CHANGE.get(section, ()):
            (fixed[section] or {}).pop(name, None)
    return fixed


def check_resumable(config: Config, counts: StepCounts, data_fingerprint: str) -> None:
    """Raises what resuming would raise for other settings or rows; needs no weights.

    Raises ConfigError if the checkpoint that ``train.resume`` asks for is not this run's, DataError
    if another version of jlora wrote it.
    """
    own = Path(config.train.output_dir) / "checkpoints"
    folder, step = chosen_checkpoint(own, config.train.resume)
    if step is not None:
        saved = checkpoint.check_run(folder, step, identity(config, counts, data_fingerprint))
        Progress.from_checkpoint(saved)


def chosen_checkpoint(folder: Path, resume: str) -> tuple[Path, int | None]:
    """The folder and the step of the checkpoint that ``train.resume`` asks for; None: none."""
    if resume in ("never", "auto"):
        return folder, checkpoint.latest(folder) if resume == "auto" else None
    return find_checkpoint(resume, "train.resume")


class Checkpoints:
    """A run's checkpoints: state, progress and, with early stopping, the best tree so far.

    A single process writes them in a thread while it goes on training. As a context it waits for
    the last one at the end, which leaves nothing half-written for the next run in the folder.

    Args:
      folder: holds a sub-folder for each step.
      settings: the ``train`` section.
      identity: see ``identity``.
      base_fingerprint: of the frozen base (``tree.fingerprint``), which is not saved.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainConfig,
        *,
        identity: dict[str, Any],
        base_fingerprint: str,
    ):
        self._folder = folder
        self._settings = settings
        self._run = {"identity": identity, "base_fingerprint": base_fingerprint}
        self.best: Any = None
        """The trainable tree of the best evaluation; None without early stopping."""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._unfinished: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
        elif self._unfinished is not None:
            wait([self._unfinished])  # what ended the training is the error to show

    def resume(
        self, state: TrainState, progress: Progress, console: Console
    ) -> tuple[TrainState, Progress]:
        """The checkpoint that ``train.resume`` asks for; what was given if there is none."""
        resume = self._settings.resume
        if resume in ("never", "auto"):
            self._discard(checkpoint.discard_incomplete, "unfinished", console)
        if resume == "never":
            self._discard(functools.partial(checkpoint.discard_later, step=-1), "earlier", console)
        folder, step = chosen_checkpoint(self._folder, resume)
        if step is None:
            return state, progress
        tree, extra = checkpoint.restore(folder, step, self._tree(state), **self._run)
        progress = Progress.from_checkpoint(extra)
        self.best = tree.get("best")
        console.note(f"resuming from step {step} ({folder / str(step)})")
        # The log is cut back to this checkpoint, so later ones no longer match it.
        later = functools.partial(checkpoint.discard_later, step=step)
        self._discard(later, "later", console)
        return tree["state"], progress

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves the state as ``<step>``; existing checkpoints stay intact if this fails.

        In a single process it returns once the state is copied to host memory and the save before
        is finished; ``wait`` returns when everything is on the disk. Several processes return only
        then, because all of them take part.

        Raises what the save before raised.
        """
        self.wait()
        alone = jax.process_count() == 1
        write = functools.partial(
            checkpoint.save,
            self._folder,
            progress.step,
            _copied_to_host(self._tree(state)) if alone else self._tree(state),
            dataclasses.asdict(progress),
            keep=self._settings.save_total_limit,
            **self._run,
        )
        if alone:
            self._unfinished = self._writer.submit(write)
        else:
            write()

    def wait(self) -> None:
        """Returns when the last save is on the disk; raises what it raised."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def raise_failed(self) -> None:
        """Raises what the last save raised, if it has failed by now."""
        if self._unfinished is not None and self._unfinished.done():
            self.wait()

    def set_best(self, trainable: Any) -> None:
        """Copies this tree as the best so far, if early stopping may return to it."""
        if self._settings.early_stopping_patience:
            # A copy, because the next step donates the state's buffers.
            self.best = jax.tree.map(lambda leaf: leaf.copy(), trainable)

    def _tree(self, state: TrainState) -> dict[str, Any]:
        if not self._settings.early_stopping_patience:
            return {"state": state}
        return {"state": state, "best": state.trainable if self.best is None else self.best}

    def _discard(self, discard: Callable[[Path], list[Path]], kind: str, console: Console) -> None:
        """Process 0 removes checkpoints; the others wait, so that they do not see them any more."""
        if jax.process_index() == 0 and (removed := discard(self._folder)):
            console.note(f"removed {kind} checkpoints: {', '.join(map(str, removed))}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"jlora {kind} checkpoints removed")


def _copied_to_host(tree: Any) -> Any:
    """The tree as NumPy arrays of its own: the next step donates the state's buffers."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    # All copies are started before the first is waited for.
    for leaf in arrays:
        leaf.copy_to_host_async()

    def copied(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and _is_on_accelerator(leaf):
            return np.asarray(leaf)  # a copy in any case
        return np.array(leaf)

    return jax.tree.map(copied, tree)


def _is_on_accelerator(leaf: jax.Array) -> bool:
    where = leaf.sharding
    in_host_memory = where.memory_kind not in (None, "device")
    # By the platform, too: the memory of CPUs is also called "device", and of their arrays
    # np.asarray is a view of the buffer.
    return not in_host_memory and all(d.platform != "cpu" for d in where.device_set)


def find_checkpoint(folder: str, key: str) -> tuple[Path, int]:
    """The parent folder and the step of ``…/checkpoints/<step>``, which the setting ``key`` names.

    Raises ConfigError if it is not a complete checkpoint.
    """
    path = Path(folder)
    if not path.name.isdigit() or int(path.name) not in checkpoint.steps(path.parent):
        complete = ", ".join(map(str, checkpoint.steps(path.parent))) or "none"
        raise ConfigError(
            "is not a complete checkpoint",
            where=f"{key}: {path}",
            fix=f"name a folder such as outputs/run1/checkpoints/500; complete here: {complete}",
        )
    return path.parent, int(path.name)


def stopped_error(step: int, signum: int, settings: TrainConfig) -> StoppedError:
    """What to raise after a signal, once the state is saved."""
    command = "the same command" if settings.resume == "auto" else "train.resume=auto"
    return StoppedError(
        f"stopped and saved at step {step}", signum=signum, fix=f"{command} resumes from here"
    )
