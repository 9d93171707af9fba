"""Loading a transformers folder, dense and quantized to NF4, compared with ``from_pretrained``.

    python benchmarks/loading.py [--widths 384,768,1536]

The folders hold random Llamas of 8 layers in bfloat16. Every unit is a new process that has
imported its library and initialised its device; the file is in the page cache. "jlora" compiles the
quantization programs; "jlora, programs cached" finds them in the persistent compilation cache, as
every start of ``jlora train`` after the first does. Needs the extra ``parity``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import llama
import paired


def write(folder: str, width: int) -> Any:
    """Writes the folder; the returned unit does nothing."""
    from jlora.io.hf import save_pretrained

    save_pretrained(folder, *llama.jlora_model(llama.shape(width)))
    return dict


def jlora_unit(folder: str, quantized: bool, cached: bool) -> Any:
    """``jlora.load_pretrained``."""
    import jax

    import jlora
    from jlora.run import environment

    if cached:
        environment.enable_compilation_cache()
    load, devices = jlora.load_pretrained, jax.devices()
    assert devices

    def unit() -> None:
        quantization = jlora.QuantConfig() if quantized else None
        jax.block_until_ready(load(folder, quantization=quantization)[1])

    return unit


def transformers_unit(folder: str, quantized: bool) -> Any:
    """``AutoModelForCausalLM.from_pretrained``; all of the weights' pages are then touched."""
    torch = llama.torch_threads()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"device_map": llama.torch_device()}
    if quantized:
        import bitsandbytes

        assert bitsandbytes
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )

    def unit() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
        for weight in model.parameters():
            weight.data.view(-1)[::2048].sum()

    return unit


def main() -> None:
    """Measures dense and quantized loading for each width."""
    parser = paired.arguments(__doc__)
    parser.add_argument("--widths", default="384,768,1536")
    args = parser.parse_args()
    widths = list(map(int, args.widths.split(",")))
    with tempfile.TemporaryDirectory() as place:
        for width in widths:
            arguments = {"folder": f"{place}/{width}", "width": width}
            paired.Worker(paired.Contestant("writing", "loading:write", arguments)).end()
        for quantized in (False, True):
            points = {}
            for width in widths:
                arguments = {"folder": f"{place}/{width}", "quantized": quantized}
                jlora_setup, transformers_setup = "loading:jlora_unit", "loading:transformers_unit"
                cache = {"JAX_COMPILATION_CACHE_DIR": f"{place}/cache"}
                cached = paired.Contestant(
                    "jlora, programs cached",
                    jlora_setup,
                    {**arguments, "cached": True},
                    cache,
                    fresh=True,
                )
                points[_millions(width)] = [
                    paired.Contestant(
                        "jlora", jlora_setup, {**arguments, "cached": False}, fresh=True
                    ),
                    cached,
                    paired.Contestant("transformers", transformers_setup, arguments, fresh=True),
                ]
                paired.measure([cached], 1)  # fills the cache
            name = f"loading-{'nf4' if quantized else 'bfloat16'}"
            axis, peers = "millions of parameters", ["transformers"]
            paired.compare(name, axis, points, args, peers=peers)


def _millions(width: int) -> int:
    """Millions of parameters in the folder, without norms."""
    return round((llama.linear_parameters(llama.shape(width)) + width * llama.VOCAB) / 1e6)


if __name__ == "__main__":
    main()
