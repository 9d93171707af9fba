"""The training step compared with peft's: LoRA, QLoRA and full fine-tuning, and how costs grow.

    python benchmarks/training_step.py [--method lora,qlora,full]
    python benchmarks/training_step.py --sweep length|depth|rank|batch|width|all [--method lora]

Without a sweep: a Llama of 63 million parameters (width 768, 8 layers), a batch of 8 × 256 tokens,
bfloat16, LoRA r 16 on every linear layer; QLoRA is NF4 with double quantization and every layer
recomputed in the backward pass. A sweep varies one number of a smaller model.

jlora's step is that of ``jlora train``: float32 adapter, bfloat16 computing, packed batches,
clipping, AdamW. peft's is transformers' model in training mode with fused attention, clipping and
fused AdamW, in two variants: under autocast, the adapter in float32 (full: all weights), as TRL
trains; and with everything in bfloat16, optimizer included, which is less precise. Neither is
compiled by torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import llama
import paired

START = 0.4
"""The largest difference of the first loss from ln(vocabulary), in nats."""
SWEEPS: dict[str, tuple[int, ...]] = {
    "length": (128, 512, 1024),
    "depth": (2, 4, 8),
    "rank": (4, 16, 64),
    "batch": (2, 4, 8),
    "width": (384, 768, 1152),
}
HEADLINE = {"length": 256, "depth": 8, "rank": 16, "batch": 8, "width": 768}
SMALL = {"length": 256, "depth": 4, "rank": 16, "batch": 2, "width": 768}


def jlora_step(
    method: str,
    sizes: Mapping[str, int],
    settings: Mapping[str, Any] | None = None,
    adapters: int = 1,
) -> Any:
    """One step of ``jlora train``; ``settings`` are added to the adapter's config, and several
    ``adapters`` are trained together, each on a part of the batch.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jlora import init_adapter
    from jlora.distributed import sharding
    from jlora.run.job import Job, make_bind
    from jlora.run.step_counts import StepCounts
    from jlora.run.train_step import TrainStep

    config = run_config(method, sizes, settings, adapters)
    mesh = sharding.make_mesh(config.mesh)
    jax.set_mesh(mesh).__enter__()
    hf = llama.shape(sizes["width"], sizes["depth"])
    remat = config.train.gradient_checkpointing
    model, base = llama.jlora_model(hf, gradient_checkpointing=remat)
    if config.lora is None:
        trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)
        base = {}
    else:
        base = llama.quantize(base) if config.quantization else base
        base = sharding.place(base, sharding.shardings(base, mesh))
        trainable = init_adapter(jax.random.key(1), base, config.lora)
        if adapters > 1:
            trainable = jax.tree.map(lambda leaf: jnp.stack([leaf] * adapters), trainable)
    job = Job(
        config=config,
        mesh=mesh,
        model=model,
        tokenizer=None,
        base=base,
        trainable=trainable,
        bind=make_bind(config),
    )
    counts = StepCounts.of(config, mesh, lambda rows: 1)
    program = TrainStep.of(job, counts, sizes["length"], documents=1)
    state = program.init_state(trainable)

    like = program.batch["input_ids"]
    ids = np.random.default_rng(0).integers(0, llama.VOCAB, like.shape, dtype=np.int32)
    labels = np.concatenate([ids[..., 1:], np.full_like(ids[..., :1], -100)], axis=-1)
    positions = np.broadcast_to(np.arange(sizes["length"], dtype=np.int32), ids.shape)
    rows = {"input_ids": ids, "labels": labels, "positions": positions}
    rows["segment_ids"] = np.ones_like(ids, bool)
    rows = {name: sharding.place(array, like.sharding) for name, array in rows.items()}

    def unit() -> dict[str, float]:
        nonlocal state
        state, metrics = program.step(state, job.frozen, rows)
        facts = {"loss": float(metrics["loss"].mean())}
        jax.block_until_ready(state)
        memory = jax.local_devices()[0].memory_stats() or {}
        return facts | ({"device_peak_bytes": peak} if (peak := _peak(memory)) else {})

    return _checked(unit)


def run_config(
    method: str,
    sizes: Mapping[str, int],
    settings: Mapping[str, Any] | None = None,
    adapters: int = 1,
    base: str = "unused",
) -> Any:
    """The settings of a run with this step; see ``jlora_step``. ``base`` is the model's folder."""
    from jlora import QuantConfig
    from jlora.config import Config, DataConfig, LoraConfig, ModelConfig, SourceConfig, TrainConfig

    names = [str(i) for i in range(adapters)] if adapters > 1 else [None]
    sources = tuple(SourceConfig(path="unused", format="text", adapter=n) for n in names)
    quantized = method == "qlora"
    return Config(
        model=ModelConfig(name_or_path=base, dtype="bfloat16"),
        quantization=QuantConfig() if quantized else None,
        lora=None if method == "full" else LoraConfig(**_adapter(sizes["rank"], settings)),
        data=DataConfig(train=sources, max_length=sizes["length"]),
        train=TrainConfig(
            output_dir="unused",
            max_steps=1000,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=sizes["batch"] // adapters,
            gradient_accumulation_steps=1,
            gradient_checkpointing=quantized,
        ),
    )


def _peak(memory: dict[str, int]) -> int:
    return memory.get("peak_bytes_in_use", 0)


def _adapter(rank: int, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of ``LoraConfig``, jlora's and peft's."""
    usual = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    return {**usual, **(settings or {})}


def peft_step(
    method: str,
    sizes: Mapping[str, int],
    autocast: bool,
    settings: Mapping[str, Any] | None = None,
    adapters: int = 1,
) -> Any:
    """The same step with peft, transformers and bitsandbytes; several ``adapters`` are trained one
    after the other.
    """
    torch = llama.torch_threads()
    dtype = "float32" if method == "full" and autocast else "bfloat16"
    names = [str(i) for i in range(adapters)]
    model = llama.transformers_model(llama.shape(sizes["width"], sizes["depth"]), dtype)
    model.config.use_cache = False
    if method == "qlora":
        model = llama.quantize_torch_model(model)
    if method != "full":
        import peft

        config = peft.LoraConfig(**_adapter(sizes["rank"], settings), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config, "0", autocast_adapter_dtype=autocast)
        for name in names[1:]:
            model.add_adapter(name, config)
    if method == "qlora":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained, optimizers = {}, {}
    for name in names:
        if adapters > 1:
            model.set_adapter(name)
        trained[name] = [p for p in model.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained[name], lr=1e-4, weight_decay=0.0, fused=True)
    device = llama.torch_device()
    shape = sizes["batch"] // adapters, sizes["length"]
    ids = torch.randint(0, llama.VOCAB, shape, device=device)
    precision = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()

    def one(name: str) -> float:
        if adapters > 1:
            model.set_adapter(name)
        with precision:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained[name], 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()
        return loss.item()

    def unit() -> dict[str, float]:
        facts = {"loss": sum(one(name) for name in names) / adapters}
        if device == "cuda":
            torch.cuda.synchronize()
            facts["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        return facts

    return _checked(unit)


def _checked(unit: Any) -> Any:
    """The unit; raises RuntimeError unless its first loss is that of an untrained model."""
    first: float | None = None

    def checked() -> dict[str, float]:
        nonlocal first
        facts = unit()
        if first is None:
            first = facts["loss"]
            if abs(first - math.log(llama.VOCAB)) > START:
                raise RuntimeError(f"the first loss is {first:.3f}, not ln {llama.VOCAB}")
        return {"first_loss": first, **facts}

    return checked


def contestants(method: str, sizes: dict[str, int]) -> list[paired.Contestant]:
    """jlora, and peft's two variants."""
    shared = {"method": method, "sizes": sizes}
    variants = {"peft, autocast": True, "peft, bfloat16": False}
    return [
        paired.Contestant("jlora", "training_step:jlora_step", shared),
        *(
            paired.Contestant(name, "training_step:peft_step", {**shared, "autocast": autocast})
            for name, autocast in variants.items()
        ),
    ]


def flops(method: str, sizes: dict[str, int]) -> float:
    """FLOPs of one step: per weight and token 2 forward, 2 for the gradient of the inputs, and 2
    for that of the weights (full) or for recomputing layers (checkpointing); the causal half of
    attention, with twice as many backward as forward; the adapter's own three passes.
    """
    hf, tokens = llama.shape(sizes["width"], sizes["depth"]), sizes["batch"] * sizes["length"]
    passes = 2 if method == "lora" else 3
    attention = 2 * hf["num_hidden_layers"] * hf["hidden_size"] * sizes["length"]  # QK and PV, half
    attention *= 4 if method == "qlora" else 3
    total = 2.0 * passes * llama.linear_parameters(hf) + attention
    if method == "qlora":
        total -= 2.0 * hf["hidden_size"] * hf["vocab_size"]  # the head is not recomputed
    if method != "full":
        width, inner = hf["hidden_size"], hf["intermediate_size"]
        kv = width // 3
        ends = 2 * (width + width) + 2 * (width + kv) + 3 * (width + inner)
        adapter = hf["num_hidden_layers"] * sizes["rank"] * ends
        total += 2.0 * (3 if method == "lora" else 4) * adapter
    return total * tokens


def main() -> None:
    """Measures the headline, or a sweep."""
    parser = paired.arguments(__doc__)
    parser.add_argument("--method", default=None, help="lora, qlora or full, or a list of them")
    parser.add_argument("--sweep", choices=[*SWEEPS, "all"])
    for name in HEADLINE:
        parser.add_argument(f"--{name}", type=int, help="instead of the default")
    args = parser.parse_args()
    given = {name: value for name in HEADLINE if (value := getattr(args, name)) is not None}
    if args.sweep is None:
        for method in (args.method or "lora,qlora,full").split(","):
            sizes, what = {**HEADLINE, **given}, llama.METHODS[method]
            facts = {"grows": False, "flops": {what: flops(method, sizes)}, "sizes": sizes}
            points = {what: contestants(method, sizes)}
            paired.compare(f"training-step-{method}", "method", points, args, warmup=2, **facts)
        return
    for method in (args.method or "lora").split(","):
        for axis in SWEEPS if args.sweep == "all" else [args.sweep]:
            every = {n: {**SMALL, **given, axis: n} for n in SWEEPS[axis]}
            points = {n: contestants(method, sizes) for n, sizes in every.items()}
            facts = {"flops": {n: flops(method, sizes) for n, sizes in every.items()}}
            facts |= {"sizes": {**SMALL, **given}}
            name = f"training-step-{method}-{axis}"
            paired.compare(name, axis, points, args, warmup=2, **facts)


if __name__ == "__main__":
    main()
