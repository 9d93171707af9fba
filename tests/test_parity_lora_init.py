"""Initial values compared with peft and NumPy: PiSSA, OLoRA, orthogonal, LoftQ, and their files.

The sign of singular vectors is arbitrary, so deltas are compared. The product of the first r has
the error of float32's rounding of the matrix divided by the gap between two singular values, which
is 1/100 of the largest here: 1e-4 is allowed, and 1e-5 for logits, which do not depend on the gap.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_peers import (
    FAST,
    IDS,
    PEERS_TALK,
    assert_close,
    compare,
    copy,
    jlora_logits,
    make_base,
    peft,
    torch,
    torch_logits,
    transformers,
)

import jlora
from jlora.errors import ConfigError, DataError
from jlora.io import peft as adapter_io
from jlora.lora import decompositions
from jlora.lora.targets import find_targets, scaling_of
from jlora.tree import paths

pytestmark = [
    *PEERS_TALK,
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]

LLAMA = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
GPT2 = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"]}
RESIDUAL_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": (
        "llama",
        {
            **LLAMA,
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
            "layers_to_transform": [1, 2],
        },
    ),
    "olora": ("llama", LLAMA),
    "pissa, gpt2": ("gpt2", GPT2),
    "pissa, DoRA": ("llama", {**LLAMA, "target_modules": ["v_proj"], "use_dora": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: make_base(name, tmp_path_factory.mktemp(name)) for name in ("llama", "gpt2")}


def initial_adapter(base, fields, key=0):
    make = jax.jit(lambda p: jlora.init_adapter(jax.random.key(key), p, config))
    config = jlora.LoraConfig(**fields)
    return make(base.params)


def deltas(adapter):
    """Module → its delta, s·A@B, (in, out)."""
    tensors = adapter_io.to_peft_tensors(dataclasses.replace(adapter, initial=None))
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith("lora_A.weight")]
    result = {}
    for name in names:
        a, b = (tensors[f"{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        module = name.removeprefix("base_model.model.")
        result[module] = scaling_of(adapter.config, module) * (b @ a).T
    return result


def kernels(params, names):
    """Module → its kernel, (in, out), for the given names."""
    result = {}
    for leaf in paths.leaves(params):
        for i, name in enumerate(leaf.modules()):
            if name in names and leaf.kind == "kernel":
                result[name] = np.asarray(leaf.value[i] if leaf.stack else leaf.value, np.float64)
    return result


def perturbed(adapter, size=0.1):
    """The adapter with noise added to its nonzero values."""
    leaves, tree = jax.tree.flatten(adapter.weights)
    rng = np.random.default_rng(0)
    noise = [jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    pairs = zip(leaves, noise, strict=True)
    weights = jax.tree.unflatten(tree, [jnp.where(x == 0, x, x + n) for x, n in pairs])
    return dataclasses.replace(adapter, weights=weights)


@pytest.mark.parametrize("name", RESIDUAL_CASES)
def test_initial_factors_are_subtracted_from_the_base_as_in_peft(bases, name, tmp_path):
    base, fields = (
        bases[RESIDUAL_CASES[name][0]],
        RESIDUAL_CASES[name][1] | {"init_lora_weights": name.split(",")[0]},
    )
    adapter = initial_adapter(base, fields)
    peft_model = peft.get_peft_model(
        copy.deepcopy(base.module), peft.LoraConfig(**fields, task_type="CAUSAL_LM")
    )
    base_logits = torch_logits(base.module)
    assert_close(jlora_logits(base, base.params, adapter), base_logits, 1e-5, "the base model")

    want = {
        n: m.get_delta_weight("default").detach().numpy().T
        for n, m in peft_model.base_model.model.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    got = deltas(adapter)
    assert set(got) == set(want)
    conv1d = base is bases["gpt2"]
    for key, value in want.items():
        assert_close(got[key], value.T if conv1d else value, 1e-4, key)
    residual_params, plain = jlora.residual(base.params, adapter)
    assert plain.initial is None and plain.config.init_lora_weights is True
    for key, value in kernels(residual_params, want).items():
        weight = peft_model.base_model.model.get_submodule(key).base_layer.weight.detach().numpy()
        assert_close(value, weight if conv1d else weight.T, 1e-4, key)

    trained = perturbed(adapter)
    logits = jlora_logits(base, base.params, trained)
    assert np.abs(logits - base_logits).max() > 0.03 * np.abs(base_logits).max()
    ordinary, pair = tmp_path / "ordinary", tmp_path / "pair"
    jlora.save_adapter(ordinary, trained)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.module), ordinary)
    assert_close(
        torch_logits(reloaded.eval()), logits, 1e-5, "an ordinary LoRA on the original base"
    )
    assert_close(
        jlora_logits(base, base.params, jlora.load_adapter(ordinary, base.params)), logits, 1e-5
    )

    residual_params, plain = jlora.residual(base.params, trained)
    jlora.save_pretrained(pair / "base", base.model, residual_params)
    jlora.save_adapter(pair / "adapter", plain)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        pair / "base", attn_implementation="eager", dtype=torch.float32
    )
    assert_close(
        torch_logits(peft.PeftModel.from_pretrained(module, pair / "adapter").eval()),
        logits,
        1e-5,
        "the residual base and its adapter",
    )
    merged = jlora.merge(base.params, trained)
    assert_close(jlora_logits(base, merged), logits, 1e-5, "merged")
    if not adapter.config.use_dora:
        unmerged = kernels(jlora.unmerge(merged, trained), want)
        for key, value in kernels(base.params, want).items():
            assert_close(unmerged[key], value, 1e-5, key)


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa, gpt2"])
def test_unconverted_peft_files_change_the_base_as_in_peft(bases, name, tmp_path):
    base, fields = (
        bases[RESIDUAL_CASES[name][0]],
        RESIDUAL_CASES[name][1] | {"init_lora_weights": name.split(",")[0]},
    )
    peft_model = peft.get_peft_model(
        copy.deepcopy(base.module), peft.LoraConfig(**fields, task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in peft_model.named_parameters():
            if "lora_" in key:
                weight.add_(0.1 * torch.randn_like(weight))
    peft_model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(base.module), tmp_path, is_trainable=True
    ).eval()
    adapter = jlora.load_adapter(tmp_path, base.params)
    compare(base, reloaded, adapter)
    without_initial = dataclasses.replace(adapter, initial=None)
    gap = np.abs(jlora_logits(base, base.params, without_initial) - torch_logits(reloaded)).max()
    assert gap > 0.05, "the initial factors must affect the logits"
    with pytest.raises(DataError, match="without its initial factors"):
        jlora.save_adapter(tmp_path / "no", without_initial)
    with pytest.raises(ConfigError, match="needs the base's values"):
        jlora.load_adapter(tmp_path, jax.eval_shape(lambda: base.params))
    quantized = jlora.quantize(base.params, jlora.QuantConfig())
    with pytest.raises(ConfigError, match="a base that was quantized then"):
        jlora.load_adapter(tmp_path, quantized)
    reloaded.merge_and_unload().save_pretrained(tmp_path / "want")
    jlora.save_pretrained(tmp_path / "got", base.model, jlora.merge(base.params, adapter))
    want, got = (load_file(tmp_path / d / "model.safetensors") for d in ("want", "got"))
    for key, value in got.items():
        assert_close(value, want[key], 1e-5, key)


@pytest.mark.parametrize(
    ("base_name", "kind", "message"),
    [
        ("llama", "pissa_niter_4", "drew random numbers"),
        ("gpt2", "olora", "takes Conv1D's inputs for outputs"),
    ],
)
def test_files_that_peft_cannot_reproduce_are_refused(bases, base_name, kind, message, tmp_path):
    base = bases[base_name]
    fields = {"init_lora_weights": kind, "r": 2}
    fields |= {"target_modules": ["q_proj" if base_name == "llama" else "attn.c_proj"]}
    config = peft.LoraConfig(**fields, task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(base.module), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        jlora.load_adapter(tmp_path, base.params)


def test_no_gradient_reaches_the_initial_factors(bases):
    base = bases["llama"]
    adapter = initial_adapter(base, {**LLAMA, "init_lora_weights": "pissa"})

    def loss(adapter):
        logits = base.model(jlora.attach(base.params, adapter), jnp.asarray(IDS))
        return jnp.sum(jnp.sin(logits))

    grads = jax.jit(jax.grad(loss), compiler_options=FAST)(adapter)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads.weights))
    assert not any(np.any(g) for g in jax.tree.leaves(grads.initial))


def test_pissa_on_a_part_of_a_projection_uses_its_columns(bases):
    base = bases["gpt2"]
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj"], "init_lora_weights": "pissa"}
    adapter = initial_adapter(base, fields)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in paths.walk(adapter.weights)}
    a, b = (next(x for p, x in leaves.items() if p[-1] == f"lora_{n}") for n in "AB")
    for i, w in enumerate(np.asarray(base.params["transformer"]["h"]["attn"]["c_attn"]["kernel"])):
        u, s, vt = np.linalg.svd(w[:, 32:64].astype(np.float64), full_matrices=False)
        assert_close(2 * a[i] @ b[i], (u[:, :3] * s[:3]) @ vt[:3], 1e-4)
    assert_close(jlora_logits(base, base.params, adapter), torch_logits(base.module), 1e-5)


def small_tree(decay=0.7, fan_in=48):
    """Two layers of two kernels whose singular values decay geometrically."""
    rng, kernels = np.random.default_rng(3), {}
    for name, shape in (("q_proj", (fan_in, 64)), ("v_proj", (32, 64))):
        matrices = []
        for _ in range(2):
            u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
            matrices.append((u * decay ** np.arange(len(vt))) @ vt)
        kernels[name] = {"kernel": jnp.asarray(np.stack(matrices), jnp.float32)}
    return {"layers": kernels}


def dense_kernels(params):
    """The kernels of ``small_tree``, dense, in float64."""
    return {n: np.asarray(dense(x["kernel"]), np.float64) for n, x in params["layers"].items()}


def dense(leaf):
    return leaf.dequantize() if hasattr(leaf, "dequantize") else leaf


def low_rank(w, r):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


SMALL = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"]}


def test_pissa_on_a_quantized_base_keeps_the_models_weights():
    settings = jlora.QuantConfig(llm_int8_skip_modules=["v_proj"])
    quantized = jlora.quantize(small_tree(), settings)
    config = jlora.LoraConfig(**SMALL, init_lora_weights="pissa")
    adapter = jlora.init_adapter(jax.random.key(0), quantized, config)
    dequantized = dense_kernels(quantized)["q_proj"]
    assert_close(dense_kernels(jlora.attach(quantized, adapter))["q_proj"], dequantized, 1e-6)
    with pytest.raises(ConfigError, match="requantize=QuantConfig"):
        jlora.residual(quantized, adapter)
    residual_params, plain = jlora.residual(quantized, adapter, requantize=settings)
    residual = np.stack([w - low_rank(w, 4) for w in dequantized])
    residual_tree = {"layers": {"q_proj": {"kernel": jnp.asarray(residual, jnp.float32)}}}
    want = dense_kernels(jlora.quantize(residual_tree, jlora.QuantConfig()))["q_proj"]
    flips = np.abs(dense_kernels(residual_params)["q_proj"] - want) > 1e-3 * np.abs(want).max()
    assert np.mean(flips) < 0.01, "only values between two codes may get another code"
    assert plain.initial is None and "q_proj" in plain.weights["layers"]


def test_pissa_niter_is_as_accurate_as_torch():
    params = small_tree()
    config = jlora.LoraConfig(**SMALL, init_lora_weights="pissa_niter_4")
    adapter = jlora.init_adapter(jax.random.key(1), params, config)
    assert_close(
        dense_kernels(jlora.attach(params, adapter))["q_proj"],
        dense_kernels(params)["q_proj"],
        1e-6,
    )
    w = params["layers"]["q_proj"]["kernel"][0]
    best = low_rank(np.asarray(w, np.float64), 4)

    def error(got):
        return np.abs(np.asarray(got) - best).max() / np.abs(best).max()

    assert error(deltas(adapter)["layers.0.q_proj"]) < 0.1
    medians = {}
    for niter in (0, 4):
        draw = functools.partial(decompositions.nearly_principal, niter=niter)
        a, b = jax.jit(jax.vmap(lambda key, draw=draw: draw(key, w, 4, jnp.float32(3))))(
            jax.random.split(jax.random.key(0), 16)
        )
        torch_errors = []
        for seed in range(16):  # the function that peft calls
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(torch.tensor(np.array(w).T), 4, niter=niter)
            torch_errors.append(error(((u * s) @ v.T).numpy().T))
        jlora_median = np.median([error(3 * (x @ y)) for x, y in zip(a, b, strict=True)])
        medians[niter] = jlora_median
        assert 1 / 3 < jlora_median / np.median(torch_errors) < 3
    assert medians[4] < 0.1 * medians[0]


def test_orthogonal_factors_have_pefts_distribution(bases):
    base = bases["llama"]
    fields = {"r": 16, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "orthogonal"}
    fields |= {"rank_pattern": {"layers.1.self_attn.q_proj": 4}}
    torch.manual_seed(0)
    peft_model = peft.get_peft_model(copy.deepcopy(base.module), peft.LoraConfig(**fields))
    want = peft.get_peft_model_state_dict(peft_model)
    adapter = initial_adapter(base, fields)
    got = adapter_io.to_peft_tensors(adapter)
    assert set(got) == set(want)
    for key, tensor in want.items():
        value, free = tensor.numpy(), tensor.numel() / 2  # half of the r directions are used
        assert got[key].shape == value.shape
        np.testing.assert_allclose(got[key].std(), value.std(), rtol=6 / math.sqrt(free))
    for name, product in deltas(adapter).items():
        a = got[f"base_model.model.{name}.lora_A.weight"]
        assert np.linalg.matrix_rank(a, 1e-4) == len(a) // 2, "as in peft"
        assert np.abs(product).max() < 1e-6
    assert_close(jlora_logits(base, base.params, adapter), torch_logits(base.module), 1e-5)


@pytest.mark.parametrize("rounds", [1, 2])
def test_loftq_follows_algorithm_1(rounds, tmp_path):
    params = small_tree()
    quantization = jlora.QuantConfig(
        bnb_4bit_use_double_quant=False, llm_int8_skip_modules=["v_proj"]
    )
    fields = {**SMALL, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "loftq"}
    config = jlora.LoraConfig(**fields, loftq_config={"loftq_iter": rounds})
    quantized, adapter = jlora.loftq(jax.random.key(0), params, config, quantization)
    assert adapter.config.init_lora_weights is True and adapter.initial is None
    got = deltas(adapter)
    for i, w in enumerate(dense_kernels(params)["q_proj"]):
        residual = w
        for _ in range(rounds):  # LoftQ's algorithm 1
            codes = jlora.nf4.quantize(jnp.asarray(residual.T, jnp.float32), 64, False, "nf4")
            dequantized = np.asarray(codes.dequantize(), np.float64).T
            delta = low_rank(w - dequantized, 4)
            residual = w - delta
        assert_close(dense_kernels(quantized)["q_proj"][i], dequantized, 1e-6)
        assert_close(got[f"layers.{i}.q_proj"], delta, 1e-4)
        assert np.linalg.norm(w - dequantized - delta) < 0.9 * np.linalg.norm(w - dequantized)
        assert not got[f"layers.{i}.v_proj"].any(), "not quantized: its delta starts at zero"
    assert np.all(adapter.weights["layers"]["v_proj"]["lora_A"] != 0)
    plain = dense_kernels(jlora.quantize(params, quantization))
    assert np.array_equal(dense_kernels(quantized)["q_proj"], plain["q_proj"]) == (rounds == 1)

    loftq_config = dataclasses.replace(adapter.config, init_lora_weights="loftq")
    jlora.save_adapter(tmp_path, dataclasses.replace(adapter, config=loftq_config))
    if rounds > 1:
        with pytest.raises(ConfigError, match="changed its base 2 times"):
            jlora.load_adapter(tmp_path, quantized)
        return
    with pytest.raises(ConfigError, match="trained on a quantized base"):
        jlora.load_adapter(tmp_path, params)
    all_quantized = jlora.quantize(params, jlora.QuantConfig(bnb_4bit_use_double_quant=False))
    reloaded = jlora.load_adapter(tmp_path, all_quantized)
    assert reloaded.config == adapter.config
    for a, b in zip(*map(jax.tree.leaves, (reloaded.weights, adapter.weights)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def cuda_is_the_cpu(monkeypatch):
    """peft's LoftQ moves tensors to "cuda"; they stay on the CPU, where bitsandbytes works, too."""
    pytest.importorskip("bitsandbytes")
    to = torch.Tensor.to

    def redirected(device):
        is_cuda = isinstance(device, str | torch.device) and torch.device(device).type == "cuda"
        return "cpu" if is_cuda else device

    def to_cpu(tensor, *args, **kwargs):
        return to(tensor, *map(redirected, args), **{k: redirected(v) for k, v in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "to", to_cpu)


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_matches_peft(rounds, cuda_is_the_cpu):
    """With lora_alpha = r, since peft ignores the scale, and rows that are a multiple of the block
    size, since bitsandbytes' CPU code dequantizes others incorrectly.
    """
    from peft.utils.loftq_utils import loftq_init

    params = small_tree(fan_in=64)
    fields = {**SMALL, "lora_alpha": SMALL["r"], "loftq_config": {"loftq_iter": rounds}}
    config = jlora.LoraConfig(**fields, init_lora_weights="loftq")
    quantization = jlora.QuantConfig(bnb_4bit_use_double_quant=False)
    quantized, adapter = jlora.loftq(jax.random.key(0), params, config, quantization)
    got, dequantized = deltas(adapter), dense_kernels(quantized)["q_proj"]
    for i, w in enumerate(params["layers"]["q_proj"]["kernel"]):
        weight = torch.tensor(np.asarray(w).T.copy())
        base, a, b = loftq_init(weight, 4, SMALL["r"], num_iter=rounds)
        assert_close(dequantized[i], base.numpy().T, 1e-5)
        assert_close(got[f"layers.{i}.q_proj"], (b @ a).numpy().T, 1e-4)


def test_impossible_configurations_are_refused_with_a_remedy():
    params, key = small_tree(), jax.random.key(0)
    loftq = jlora.LoraConfig(**SMALL, init_lora_weights="loftq")
    with pytest.raises(ConfigError, match=r"jlora\.loftq\("):
        jlora.init_adapter(key, params, loftq)
    with pytest.raises(ConfigError, match="nf4"):
        jlora.loftq(key, params, loftq, jlora.QuantConfig(bnb_4bit_quant_type="fp4"))
    quantized = jlora.quantize(params, jlora.QuantConfig())
    with pytest.raises(ConfigError, match="load it dense"):
        jlora.loftq(key, quantized, loftq, jlora.QuantConfig())
    with pytest.raises(ConfigError, match="has no 50 directions"):
        find_targets(params, jlora.LoraConfig(**SMALL | {"r": 50}, init_lora_weights="pissa"))
    experts = {"mlp": {"experts": {"gate_up_proj": jnp.zeros((2, 8, 6))}}}
    config = jlora.LoraConfig(
        target_modules=(), target_parameters=["experts.gate_up_proj"], init_lora_weights="olora"
    )
    with pytest.raises(ConfigError, match="olora is not possible for experts"):
        find_targets(experts, config)
