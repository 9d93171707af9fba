"""``python -m jlora.evaluate RUN``: held-out loss, perplexity or accuracy and F1, exact match."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("evaluate"))

import argparse
import functools
import json
from pathlib import Path

import jax

from jlora.config import Config
from jlora.distributed import processes
from jlora.distributed.devices import unused_gpus
from jlora.distributed.mesh import compiler_options
from jlora.errors import ConfigError
from jlora.files import write_atomic
from jlora.inference import scoring
from jlora.run import environment
from jlora.run.batches import check_rows_fit, eval_device_batches, prepare_rows
from jlora.run.data_summary import data_warnings
from jlora.run.label_names import with_label_names
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import note_other_tokenizer, open_tokenizer
from jlora.run.replies import greedy_replies, reply_prompts
from jlora.run.step_counts import eval_batch_rows
from jlora.training.step import make_eval_step
from jlora.ui.console import Console

main = functools.partial(cli.main, "evaluate")


def run(config: Config, options: argparse.Namespace) -> None:
    """Evaluates the result in ``train.output_dir`` on ``data.eval``.

    Prints the figures and writes them to ``evaluation.json`` in that folder, with the replies if
    ``evaluate.exact_match`` asks for them.
    """
    del options
    if not config.data.eval:
        raise ConfigError(
            "there are no held-out rows", where="data.eval", fix="name a file to evaluate on"
        )
    processes.initialize()
    if config.train.compilation_cache:
        environment.enable_compilation_cache()
    console = Console(enabled=jax.process_index() == 0)
    config, _ = with_label_names(config)
    tokenizer = open_tokenizer(config)
    if text := unused_gpus():
        console.warn(text)
    note_other_tokenizer(console, config, tokenizer)
    rows = prepare_rows(config, tokenizer, "eval")
    with console.loading() as progress:
        job = open_job(config, tokenizer, trained=True, progress=progress)
    check_rows_fit(job, rows)
    for text in data_warnings([rows], job.model.config.max_position_embeddings):
        console.warn(text)
    with jax.set_mesh(job.mesh):
        determinism = config.train.full_determinism
        xla_options = compiler_options(job.mesh, full_determinism=determinism)
        step = make_eval_step(job.model, job.bind, xla_options)
        batches = eval_device_batches(job.mesh, rows, eval_batch_rows(config, job.mesh))
        held_out = scoring.held_out(step, job.trainable, job.frozen, batches)
        count_name = "eval_samples" if config.is_classification else "eval_tokens"
        result = {**held_out.figures, count_name: held_out.tokens}
        samples = greedy_replies(job, job.trainable, reply_prompts(job))
    if config.evaluate.exact_match:
        result["eval_exact_match"] = scoring.exact_match(samples)
        result["eval_replies"] = len(samples)
    file = Path(config.train.output_dir) / "evaluation.json"
    if jax.process_index() == 0:
        replies = [{**s._asdict(), "exact": s.exact} for s in samples]
        text = json.dumps({**result, "replies": replies}, indent=2, ensure_ascii=False)
        write_atomic(file, text + "\n")
    shown = samples[: config.evaluate.samples]
    console.samples([{"prompt": s.prompt, "after": s.reply, "expected": s.expected} for s in shown])
    console.card("evaluated", {**result, "written to": file})
