"""What a run writes to its output folder besides checkpoints and the log.

``config.yaml`` and ``base_model.json`` at its start; the adapter or the model, the tokenizer and
``report.html`` at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jlora.config import to_yaml
from jlora.data import Prepared
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.files import staged_folder, write_atomic
from jlora.io.hf import save_pretrained
from jlora.io.hf.write import staged_model
from jlora.io.peft import (
    CONFIG_FILE,
    TENSOR_FILE,
    embeddings_to_save,
    save_adapter,
    write_base_record,
)
from jlora.lora import Adapter
from jlora.models import Model
from jlora.run.data_summary import data_warnings, sources_table
from jlora.run.job import Job
from jlora.run.step_counts import StepCounts
from jlora.ui import metrics_log, report
from jlora.ui.console import Console

SUMMARY = ("eval_loss", "eval_accuracy", "eval_f1", "eval_exact_match", "tokens")
"""Figures of the log whose last values head the report."""


def write_settings(job: Job, base_record: dict[str, str] | None) -> None:
    """``config.yaml``, every setting as it was resolved, from which the same run can be started.

    Beside it, for an adapter, ``base_model.json``: which base it is trained on.
    """
    if jax.process_index() != 0:
        return
    out = Path(job.config.train.output_dir)
    write_atomic(out / "config.yaml", to_yaml(job.config))
    if base_record is not None:
        write_base_record(out, base_record)


def write_trained(
    out: Path, dtype: str, model: Model, tokenizer: Any, trained: Any, embeddings: Any = None
) -> str:
    """Writes the adapter, or the fully trained model in ``dtype``, with its tokenizer.

    Every process calls this, since arrays may be sharded over all; process 0 writes.

    Args:
      out: the folder.
      dtype: see above.
      model: the base.
      tokenizer: the run's.
      trained: the Adapter or the parameters.
      embeddings: see ``save_adapter``.

    Returns:
      What was written, for people; empty in the other processes.
    """
    tree, embeddings = sharding.gather((trained, embeddings))
    if jax.process_index() != 0:
        return ""
    if isinstance(tree, Adapter):
        with staged_folder(out, last=CONFIG_FILE) as folder:
            size = save_adapter(folder, tree, embeddings=embeddings)
            tokenizer.save_pretrained(folder)
        return f"{out / TENSOR_FILE} ({size / 2**20:,.1f} MiB)"
    saved_dtype = jax.numpy.dtype(dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(saved_dtype), tree)
    save_model(out, model, params, tokenizer)
    return str(out / "model.safetensors")


def check_no_adapter(key: str, out: Path) -> None:
    """ConfigError if ``out``, the folder that a setting names for a model, holds an adapter."""
    if (out / CONFIG_FILE).exists():
        raise ConfigError(
            f"{out} holds an adapter, which transformers would put on the model in it",
            where=key,
            fix="name another folder",
        )


def save_model(
    out: Path, model: Model, params: Any, tokenizer: Any, *, quantized: bool = False
) -> None:
    """Writes a model with its tokenizer, see ``save_pretrained``; all of it or nothing."""
    with staged_model(out) as folder:
        save_pretrained(folder, model, params, quantized=quantized)
        if jax.process_index() == 0:
            tokenizer.save_pretrained(folder)


def note_local_base(console: Console, trained: Any) -> None:
    """Says that an adapter names its base by a path, which other machines do not have."""
    name = trained.config.base_model_name_or_path if isinstance(trained, Adapter) else None
    if name and Path(name).is_dir():
        console.note(
            f"{CONFIG_FILE} names the base model by a path of this machine ({name}); for others, "
            "set lora.base_model_name_or_path to its name on the hub"
        )


def write_results(
    job: Job,
    counts: StepCounts,
    rows: Mapping[str, Sequence[Prepared]],
    trained: Any,
    base_record: dict[str, str] | None,
    samples: list[dict[str, str]],
    console: Console,
) -> None:
    """Writes what was trained and the report, and shows where everything is.

    ``rows`` has those of ``train`` and ``eval``.
    """
    written = []
    for adapter_job, tree in job.per_adapter(trained):
        if isinstance(tree, Adapter):
            # The file holds the difference from what the adapter started from.
            tree = dataclasses.replace(tree, initial=job.initial)
        if job.adapters:  # each folder is a run of its own to the other commands
            write_settings(adapter_job, base_record)
        out = Path(adapter_job.config.train.output_dir)
        dtype, tables = job.config.model.dtype, None
        if isinstance(tree, Adapter):
            tables = embeddings_to_save(job.model, job.base, tree.config)
        written.append(write_trained(out, dtype, job.model, job.tokenizer, tree, tables))
    if jax.process_index() != 0:
        return
    note_local_base(console, trained)
    console.samples(samples)
    html = _write_report(job, counts, rows, samples)
    _show_final_card(console, job, ", ".join(written), html)


def _write_report(
    job: Job,
    counts: StepCounts,
    rows: Mapping[str, Sequence[Prepared]],
    samples: list[dict[str, str]],
) -> Path:
    """``report.html`` from the run's log, and what the header said of the rows."""
    out = Path(job.config.train.output_dir)
    lines = metrics_log.read_metrics(out / "metrics.jsonl")
    summary = {"model": job.config.model.name_or_path, "steps": counts.total_steps}
    for line in lines:
        summary |= {name: line[name] for name in SUMMARY if name in line}
    prepared = [part for parts in rows.values() for part in parts]
    warnings = data_warnings(prepared, job.model.config.max_position_embeddings)
    page = report.report_html(
        title=out.name,
        config_yaml=to_yaml(job.config),
        metrics=lines,
        samples=samples,
        summary=summary,
        sources=sources_table(rows),
        warnings=warnings,
    )
    return report.write_report(out, page)


def _show_final_card(console: Console, job: Job, written: str, html: Path) -> None:
    """Where everything is, and the commands to run next."""
    out = job.config.train.output_dir
    result = f"{out}/{job.adapters[0]}" if job.adapters else out
    files = {
        "adapter" if job.config.lora else "model": written,
        "report": html,
        "metrics": Path(out) / "metrics.jsonl",
        "checkpoints": Path(out) / "checkpoints",
        "settings": Path(out) / "config.yaml",
    }
    commands = [f"jlora evaluate {result}"]
    if not job.config.is_classification:
        commands.insert(0, f'jlora generate {result} generate.prompt="…"')
    if job.config.lora:
        commands.append(f"jlora merge {result}")
    console.card("done", files, commands)
