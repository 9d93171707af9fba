"""How cost grows with the number of adapters, in one batch and in one training run.

    python benchmarks/many_adapters.py [--what serve,train] [--method lora,qlora]

The Llama of the training step's sweeps (width 768, 4 layers, bfloat16), 8 rows of 256 tokens,
divided evenly among the adapters; r 16 on every linear layer. ``serve`` is a forward pass in which
each row has its own adapter, compared with one adapter for all rows and with peft's
``adapter_names``. ``train`` is a step of every adapter on its own rows: jlora trains all of them at
once, peft one after the other. Needs the extra ``parity``.
"""

from __future__ import annotations

from typing import Any

import llama
import paired
from training_step import SMALL

ROWS = 8


def jlora_forward(method: str, adapters: int, mixed: bool, length: int) -> Any:
    """Logits of rows that use ``adapters`` in turn; unless ``mixed``, one adapter, unstacked."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jlora
    from jlora.config import MeshConfig
    from jlora.distributed import sharding
    from jlora.distributed.mesh import compiler_options

    model, params = llama.jlora_model(llama.shape(SMALL["width"], SMALL["depth"]))
    params = llama.quantize(params) if method == "qlora" else params
    lora = jlora.LoraConfig(r=SMALL["rank"], target_modules="all-linear", init_lora_weights=False)
    keys = jax.random.split(jax.random.key(1), adapters)
    every = [jlora.init_adapter(key, params, lora) for key in keys]
    adapter = jlora.stack_adapters(every) if mixed else every[0]
    ids = np.random.default_rng(0).integers(0, llama.VOCAB, (ROWS, length), dtype=np.int32)
    rows = jnp.arange(ROWS) % adapters if mixed else None
    options = compiler_options(sharding.make_mesh(MeshConfig()))

    def forward(params: Any, adapter: Any, ids: Any) -> Any:
        return model(jlora.attach(params, adapter, adapter_ids=rows), ids)

    compiled = jax.jit(forward, compiler_options=options)

    def unit() -> None:
        jax.block_until_ready(compiled(params, adapter, ids))

    return unit


def peft_forward(method: str, adapters: int, length: int) -> Any:
    """The same with ``adapter_names``."""
    torch = llama.torch_threads()
    import peft

    model = llama.transformers_model(llama.shape(SMALL["width"], SMALL["depth"]))
    model = llama.quantize_torch_model(model) if method == "qlora" else model
    lora = peft.LoraConfig(
        r=SMALL["rank"], target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    names = [f"a{i}" for i in range(adapters)]
    model = peft.get_peft_model(model, lora, names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    model.eval()
    ids = torch.randint(0, llama.VOCAB, (ROWS, length), device=llama.torch_device())
    rows = [names[i % adapters] for i in range(ROWS)]

    def unit() -> None:
        with torch.inference_mode():
            model(input_ids=ids, adapter_names=rows, use_cache=False)

    return unit


def serving(method: str, adapters: int, length: int) -> list[paired.Contestant]:
    """jlora with an adapter per row, jlora with one for all rows, and peft."""
    arguments = {"method": method, "adapters": adapters, "length": length}
    forward = "many_adapters:jlora_forward"
    return [
        paired.Contestant("jlora", forward, {**arguments, "mixed": True}),
        paired.Contestant(
            "jlora, one for all", forward, {**arguments, "adapters": 1, "mixed": False}
        ),
        paired.Contestant("peft", "many_adapters:peft_forward", arguments),
    ]


def training(method: str, adapters: int, length: int) -> list[paired.Contestant]:
    """jlora, which trains all adapters at once, and peft, which trains one after the other."""
    sizes = {**SMALL, "batch": ROWS, "length": length}
    arguments = {"method": method, "sizes": sizes, "adapters": adapters}
    return [
        paired.Contestant("jlora", "training_step:jlora_step", arguments),
        paired.Contestant("peft", "training_step:peft_step", {**arguments, "autocast": True}),
    ]


def main() -> None:
    """Measures each number of adapters."""
    parser = paired.arguments(__doc__)
    parser.add_argument("--what", default="serve,train")
    parser.add_argument("--method", default="lora,qlora")
    parser.add_argument("--adapters", default="1,2,4,8")
    parser.add_argument("--length", type=int, default=SMALL["length"])
    args = parser.parse_args()
    numbers = [int(n) for n in args.adapters.split(",")]
    for what in args.what.split(","):
        contestants = {"serve": serving, "train": training}[what]
        for method in args.method.split(","):
            points = {n: contestants(method, n, args.length) for n in numbers}
            name = f"many-adapters-{what}-{method}"
            paired.compare(name, "adapters", points, args, warmup=2, peers=["peft"])


if __name__ == "__main__":
    main()
