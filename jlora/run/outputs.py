"""What a run leaves in its output folder, and how it finds its way back from there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.experimental import multihost_utils

from jlora import data
from jlora.config import Config, TrainConfig, to_yaml
from jlora.distributed import sharding
from jlora.errors import ConfigError, StoppedError
from jlora.files import storage_errors, write_atomic
from jlora.inference import scoring
from jlora.io import checkpoint
from jlora.io.hf import save_pretrained
from jlora.io.peft import base_record, save_adapter, write_record
from jlora.lora import Adapter
from jlora.models import Model
from jlora.run.job import Job
from jlora.run.progress import Plan, Progress
from jlora.training.state import TrainState
from jlora.tree.fingerprint import fingerprint
from jlora.ui import metrics_log, report
from jlora.ui.console import Console

FREE_TO_CHANGE = {
    "model": ("attention",),
    "train": (
        "output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "resume",
        "compilation_cache", "check_memory",
        "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "gradient_checkpointing", "activation_offloading",
        "early_stopping_patience", "early_stopping_threshold", "num_train_epochs", "max_steps",
    ),
}  # fmt: skip
"""Settings that may differ between a checkpoint and the run that goes on from it."""


def identity(config: Config, plan: Plan, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint's run and the run that resumes it must have in common."""
    kept = settled(config, "model", "quantization", "lora", "train")
    kept["train"]["early_stopping"] = bool(config.train.early_stopping_patience)
    rows = {"rows_per_step": plan.rows_per_step, "total_steps": plan.total_steps}
    shuffle = {"fingerprint": data_fingerprint, "shuffle": config.data.shuffle}
    return {**kept, "data": shuffle, "plan": rows}


def settled(config: Config, *sections: str) -> dict[str, Any]:
    """The settings in these sections that a checkpoint's run may not change."""
    settings, kept = yaml.safe_load(to_yaml(config)), {}
    for section in sections:
        kept[section] = settings.get(section)
        for name in FREE_TO_CHANGE.get(section, ()):
            kept[section].pop(name)
    return kept


class Checkpoints:
    """The run's checkpoints: state, progress and, with early stopping, the best tree so far."""

    def __init__(self, folder: Path, job: Job, plan: Plan, data_fingerprint: str):
        self._folder = folder
        self._settings = job.config.train
        self._run = {
            "identity": identity(job.config, plan, data_fingerprint),
            "base_fingerprint": fingerprint(job.base),
        }
        self.best: Any = None
        """The trainable tree of the last better evaluation; kept only with early stopping."""

    def resume(
        self, state: TrainState, progress: Progress, console: Console
    ) -> tuple[TrainState, Progress]:
        """The newest whole checkpoint, the one that ``train.resume`` names, or what was given."""
        folder, step = self._folder, None
        if self._settings.resume == "never":
            self._clear(checkpoint.discard_incomplete, "unfinished", console)
            self._clear(functools.partial(checkpoint.discard_later, step=-1), "earlier", console)
        elif self._settings.resume == "auto":
            self._clear(checkpoint.discard_incomplete, "unfinished", console)
            step = checkpoint.latest(folder)
        else:
            folder, step = named(self._settings.resume, "train.resume")
        if step is None:
            return state, progress
        tree, extra = checkpoint.restore(folder, step, self._tree(state), **self._run)
        self.best = tree.get("best")
        console.note(f"going on from step {step} ({folder / str(step)})")
        later = functools.partial(checkpoint.discard_later, step=step)
        self._clear(later, "later", console)  # their part of the log is dropped, too
        return tree["state"], Progress(**extra)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves the state as ``<step>``; what is there already stays whole if this fails."""
        checkpoint.save(
            self._folder,
            progress.step,
            self._tree(state),
            dataclasses.asdict(progress),
            keep=self._settings.save_total_limit,
            **self._run,
        )

    def keep_best(self, trainable: Any) -> None:
        """Remembers this tree as the best, if early stopping may go back to it."""
        if self._settings.early_stopping_patience:
            self.best = jax.tree.map(lambda leaf: leaf.copy(), trainable)

    def _tree(self, state: TrainState) -> dict[str, Any]:
        if not self._settings.early_stopping_patience:
            return {"state": state}
        return {"state": state, "best": state.trainable if self.best is None else self.best}

    def _clear(self, discard: Callable[[Path], list[Path]], kind: str, console: Console) -> None:
        """Process 0 removes checkpoints; the others look only after it has."""
        if jax.process_index() == 0 and (removed := discard(self._folder)):
            console.note(f"removed {kind} checkpoints: {', '.join(map(str, removed))}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"jlora {kind} checkpoints removed")


def named(checkpoint_folder: str, key: str) -> tuple[Path, int]:
    """The folder and the step of ``…/checkpoints/<step>``, which the setting ``key`` names."""
    folder = Path(checkpoint_folder)
    if not folder.name.isdigit() or int(folder.name) not in checkpoint.steps(folder.parent):
        whole = ", ".join(map(str, checkpoint.steps(folder.parent))) or "none"
        raise ConfigError(
            "is not a whole checkpoint",
            where=f"{key}: {folder}",
            fix=f"name a folder such as outputs/run1/checkpoints/500; whole here: {whole}",
        )
    return folder.parent, int(folder.name)


def stopped(step: int, signum: int, settings: TrainConfig) -> StoppedError:
    """What to raise after a signal, when the state is saved."""
    again = "the same command" if settings.resume == "auto" else "train.resume=auto"
    return StoppedError(
        f"stopped and saved at step {step}", signum=signum, fix=f"{again} goes on from here"
    )


def write_settings(job: Job) -> None:
    """``config.yaml``: every setting as it was resolved; the same command line runs it again.

    Beside it, for an adapter, which base model it is trained on.
    """
    out = Path(job.config.train.output_dir)
    base = base_record(job.base, job.trainable.config) if job.config.lora else None
    if jax.process_index() != 0:
        return
    write_atomic(out / "config.yaml", to_yaml(job.config))
    if base is not None:
        write_record(out, base)


def prompts(job: Job) -> list[data.ReplyRow]:
    """The held-out rows that replies are generated for."""
    wanted, config = job.config.evaluate, job.config
    most = wanted.max_rows if wanted.exact_match else wanted.samples
    return data.reply_rows(config.data.eval, job.tokenizer, config.data, most)


def replies(job: Job, trainable: Any, rows: list[data.ReplyRow]) -> list[scoring.Sample]:
    """The greedy replies of the model with this adapter (or these parameters)."""
    return scoring.replies(
        job.model,
        job.bind(job.frozen, trainable, None),
        job.tokenizer,
        rows,
        max_new_tokens=job.config.evaluate.max_new_tokens,
        batch_size=job.config.evaluate.batch_size,
        eos_ids=job.eos_ids,
    )


def write_model(out: Path, dtype: str, model: Model, tokenizer: Any, trained: Any) -> str:
    """The adapter, or the fully trained model in ``dtype``, with its tokenizer; says what it wrote.

    ``trained`` may lie on many devices; every process calls this.
    """
    tree = sharding.gather(trained)
    if jax.process_index() != 0:
        return ""
    if isinstance(tree, Adapter):
        size = save_adapter(out, tree)
        written = f"{out / 'adapter_model.safetensors'} ({size / 2**20:,.1f} MiB)"
    else:
        kept = jax.numpy.dtype(dtype)
        save_pretrained(out, model, jax.tree.map(lambda leaf: leaf.astype(kept), tree))
        written = str(out / "model.safetensors")
    with storage_errors(out):
        tokenizer.save_pretrained(out)
    return written


def finish(
    job: Job,
    plan: Plan,
    trained: Any,
    before: list[str],
    after: list[scoring.Sample],
    console: Console,
) -> None:
    """Writes the result and the report, shows samples, and says where everything lies."""
    each, dtype = job.each(trained), job.config.model.dtype
    written = []
    for one, own in each:
        if isinstance(own, Adapter):
            own = dataclasses.replace(own, initial=job.initial)
        if job.adapters:
            write_settings(one)
        out = Path(one.config.train.output_dir)
        written.append(write_model(out, dtype, job.model, job.tokenizer, own))
    if jax.process_index() != 0:
        return
    shown = [
        {"prompt": a.prompt, "before": b, "after": a.reply, "expected": a.expected}
        for b, a in zip(before, after, strict=False)
    ]
    console.samples(shown)
    html = _write_report(job, plan, shown)
    _final_card(console, job, ", ".join(written), html)


def _write_report(job: Job, plan: Plan, samples: list[dict[str, str]]) -> Path:
    """``report.html`` from the run's log."""
    out = Path(job.config.train.output_dir)
    lines = metrics_log.read(out / "metrics.jsonl")
    summary = {"model": job.config.model.name_or_path, "steps": plan.total_steps}
    figures = ("eval_loss", "eval_accuracy", "eval_f1", "eval_exact_match", "tokens")
    for line in lines:
        summary |= {k: line[k] for k in figures if k in line}
    return report.write_report(out, out.name, to_yaml(job.config), lines, samples, summary)


def _final_card(console: Console, job: Job, written: str, html: Path) -> None:
    """Where everything lies and what to run next."""
    out = job.config.train.output_dir
    result = f"{out}/{job.adapters[0]}" if job.adapters else out
    where = {
        "adapter" if job.config.lora else "model": written,
        "report": html,
        "metrics": Path(out) / "metrics.jsonl",
        "checkpoints": Path(out) / "checkpoints",
        "settings": Path(out) / "config.yaml",
    }
    commands = [f"jlora evaluate {result}"]
    if not job.config.classifies:
        commands.insert(0, f'jlora generate {result} generate.prompt="…"')
    if job.config.lora:
        commands.append(f"jlora merge {result}")
    console.card("done", where, commands)
