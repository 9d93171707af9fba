"""``python -m jlora.quantize CONFIG``: a quantized base, as a folder that transformers loads."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("quantize"))

import argparse
import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jlora.config import Config, QuantConfig
from jlora.distributed import processes, sharding
from jlora.errors import ConfigError
from jlora.files import check_output, storage_errors
from jlora.io.hf import load_pretrained, prequantized_write
from jlora.io.hf.folder import find_folder, shard_files
from jlora.io.hf.read import read_model
from jlora.quant.params import is_quantized, quantize_params, scheme_text
from jlora.run.artifacts import check_no_adapter, save_model
from jlora.run.new_tokens import vocab_size
from jlora.run.open_tokenizer import open_with_new_tokens
from jlora.tree import paths
from jlora.ui.console import Console

main = functools.partial(cli.main, "quantize")


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes the base, quantized as ``quantization`` says, to ``quantize.output_dir``.

    Matrices are quantized one by one while they are read. Settings whose result transformers could
    not load are refused before that.
    """
    del options
    asked = config.quantization
    if asked is None:
        raise ConfigError(
            "the settings do not say how to quantize",
            where="quantization",
            fix="add the section, such as quantization: {load_in_4bit: true}",
        )
    processes.initialize()
    console = Console(enabled=jax.process_index() == 0)
    source = find_folder(config.model.name_or_path, config.model.revision)
    out = Path(config.quantize.output_dir or Path(config.train.output_dir) / "quantized")
    _check_output(source, out, asked)
    config, tokenizer = open_with_new_tokens(config, console)
    console.note(f"reading {config.model.name_or_path}, quantizing to {scheme_text(asked)}")
    with jax.set_mesh(sharding.make_mesh(config.mesh)) as mesh:
        with console.loading() as progress:
            model, params = load_pretrained(
                source,
                config.model.dtype,
                asked,
                mesh,
                progress=progress,
                untie=config.model.untie,
                vocab_size=vocab_size(config, tokenizer, read_model(source), trained=False),
            )
        console.note(f"writing {out}")
        # The model's dtype becomes bnb_4bit_compute_dtype in the folder's config.json.
        model = dataclasses.replace(model, dtype=asked.bnb_4bit_compute_dtype)
        save_model(out, model, params, tokenizer, quantized=True)
    if jax.process_index() == 0:
        rows = {
            "quantized model": out,
            "format": scheme_text(asked),
            **_quantized_share(params),
        }
        with storage_errors(out):
            rows["weights before"] = _size(shard_files(source)[0])
            rows["weights after"] = _size(shard_files(out)[0])
        console.card("quantized", rows)


def _check_output(source: Path, out: Path, asked: QuantConfig) -> None:
    """ConfigError for an output that cannot be written or loaded, before any weight is read."""
    check_output("quantize.output_dir", out, {"the folder of the base model": source})
    check_no_adapter("quantize.output_dir", out)
    shapes = read_model(source, asked).shapes
    prequantized_write.check_writable(jax.eval_shape(lambda p: quantize_params(p, asked), shapes))


def _quantized_share(params: Any) -> dict[str, str]:
    """How many of the parameters are quantized, and to how many bits each, scales included."""
    leaves = [leaf for _, leaf in paths.walk(params)]
    quantized = [leaf for leaf in leaves if is_quantized(leaf)]
    size, total = sum(leaf.size for leaf in quantized), sum(leaf.size for leaf in leaves)
    bits = 8 * sum(leaf.nbytes for leaf in quantized) / size
    return {"quantized": f"{size:,} of {total:,} parameters, {bits:.2f} bits each"}


def _size(files: Iterable[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB"
