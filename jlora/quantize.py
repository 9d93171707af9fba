"""``python -m jlora.quantize CONFIG``: the base packed, as a folder that transformers loads."""

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
from jlora.files import storage_errors
from jlora.io.hf import load_pretrained, prequantized_write, save_pretrained
from jlora.io.hf.folder import find_folder, shard_files
from jlora.io.hf.read import read_model
from jlora.quant.params import describe, is_quantized, quantize_params
from jlora.run.job import open_tokenizer
from jlora.tree import paths
from jlora.ui.console import Console

main = functools.partial(cli.main, "quantize")


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes the base, packed as ``quantization`` says, to ``quantize.output_dir``.

    Matrices are packed one by one while they are read. What transformers could not load is refused
    before that.
    """
    del options
    asked = config.quantization
    if asked is None:
        raise ConfigError(
            "nothing says how to quantize",
            where="quantization",
            fix="add the section, such as quantization: {load_in_4bit: true}",
        )
    processes.initialize()
    console = Console(enabled=jax.process_index() == 0)
    source = find_folder(config.model.name_or_path, config.model.revision)
    out = Path(config.quantize.output_dir or Path(config.train.output_dir) / "quantized")
    _check(source, out, asked)
    tokenizer = open_tokenizer(config)
    console.note(f"reading {config.model.name_or_path}, packing as {describe(asked)}")
    with jax.set_mesh(sharding.make_mesh(config.mesh)) as mesh:
        with console.loading() as progress:
            model, params = load_pretrained(
                source, config.model.dtype, asked, mesh, progress=progress
            )
        console.note(f"writing {out}")
        model = dataclasses.replace(model, dtype=asked.bnb_4bit_compute_dtype)
        files = save_pretrained(out, model, params, quantized=True)
    if jax.process_index() == 0:
        with storage_errors(out):
            tokenizer.save_pretrained(out)
            rows = {"quantized model": out, "format": describe(asked), **_packed(params)}
            rows["weights before"] = _size(shard_files(source)[0])
            rows["weights after"] = _size(file for file in files if file.suffix == ".safetensors")
        console.card("quantized", rows)


def _check(source: Path, out: Path, asked: QuantConfig) -> None:
    """ConfigError for what would end badly, before any weight is read."""
    if out.expanduser().resolve() == source.resolve():
        raise ConfigError(
            "is the model's own folder, which would be overwritten",
            where="quantize.output_dir",
            fix="name another one",
        )
    shapes = read_model(source).shapes
    prequantized_write.check(jax.eval_shape(lambda p: quantize_params(p, asked), shapes))


def _packed(params: Any) -> dict[str, str]:
    """How much is packed, and into how many bits a parameter."""
    leaves = [leaf for _, leaf in paths.walk(params)]
    packed = [leaf for leaf in leaves if is_quantized(leaf)]
    size, every = sum(leaf.size for leaf in packed), sum(leaf.size for leaf in leaves)
    bits = 8 * sum(leaf.nbytes for leaf in packed) / size
    return {"packed": f"{size:,} of {every:,} parameters, in {bits:.2f} bits each"}


def _size(files: Iterable[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB"
