"""LoRA+ and LoRA-FA compared with peft's optimizers, given the same gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_peers import PEERS_TALK

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa  # noqa: E402

from jlora.config import LoraConfig, TrainConfig  # noqa: E402
from jlora.lora import Adapter  # noqa: E402
from jlora.training import optim  # noqa: E402
from jlora.training.optim.lora_fa import precondition_b  # noqa: E402
from jlora.tree import paths  # noqa: E402

pytestmark = [*PEERS_TALK, pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")]

TOTAL, STEPS, RATE = 20, 5, 2e-3
LEAF_NAMES = {"lora_magnitude_vector": "lora_magnitude_vector", "lora_B.bias": "lora_bias"}


def make_model(**fields):
    """A tiny random Llama with a random adapter of peft, and the adapter's config."""
    torch.manual_seed(0)
    base = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    config = peft.LoraConfig(init_lora_weights=False, **fields)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.ndim == 1:
                p.add_(torch.randn_like(p))
    return model, config


def to_tree(values):
    """peft's parameters by name as the leaves of an adapter: layers stacked, matrices (in, out)."""
    stacked = {}
    for name, value in values.items():
        path, transposed = leaf_path(name)
        layers = stacked.setdefault(tuple("layers" if p.isdigit() else p for p in path), [])
        layers.append(np.array(value).T if transposed else np.array(value))
    leaves = {}
    for path, layers in stacked.items():
        has_layers = "layers" in path
        key = tuple(p for i, p in enumerate(path) if not (p == "layers" and path[i - 1] == p))
        leaves[key] = jnp.asarray(np.stack(layers) if has_layers else layers[0])
    return paths.nest(leaves)


def leaf_path(name):
    """The leaf's path, which contains layer numbers, and whether torch stores the transpose."""
    name = re.sub(r"^base_model\.model\.|\.default|\.modules_to_save|\.base_layer", "", name)
    module, _, kind = name.rpartition(".")
    for end, leaf in LEAF_NAMES.items():
        if name.removesuffix(".weight").endswith(end):
            return (*name.split(f".{end}")[0].split("."), leaf), False
    if kind == "weight":
        node, _, last = module.rpartition(".")
        if last.startswith("lora_"):
            return (*node.split("."), last), True
        kind = "scale" if last == "norm" else "embedding" if last == "embed_tokens" else "kernel"
        return (*module.split("."), kind), kind == "kernel"
    # lora_embedding_A and _B are bare parameters, (r, vocabulary) and (dim, r)
    return (*module.split("."), kind), kind.startswith("lora_embedding")


def draw(model, seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(tuple(p.shape)).astype(np.float32)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def train_both(model, config, peft_optimizer, settings):
    """Start values, path → parameter after peft's steps and after jlora's, and jlora's state."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad or "lora_" in n}
    start = {name: p.detach().numpy().copy() for name, p in trained.items()}
    adapter = Adapter(to_tree(start), config)
    transform = optim.make_optimizer(settings, TOTAL, adapter)
    update = jax.jit(transform.update)
    schedule = transformers.get_scheduler(
        "linear", peft_optimizer, num_warmup_steps=0, num_training_steps=TOTAL
    )
    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        state = transform.init(adapter)
        for seed in range(1, STEPS + 1):
            gradients = draw(model, seed)
            for name, p in trained.items():
                p.grad = torch.tensor(gradients[name]) if name in gradients else None
            torch.nn.utils.clip_grad_norm_(trained.values(), 3.0)
            peft_optimizer.step()
            schedule.step()
            zeros = {name: np.zeros_like(value) for name, value in start.items()}
            updates, state = update(Adapter(to_tree(zeros | gradients), config), state, adapter)
            adapter = optax.apply_updates(adapter, updates)
    expected = to_tree({name: p.detach().numpy() for name, p in trained.items()})
    actual = dict(paths.walk(adapter.weights))
    return start, dict(paths.walk(expected)), actual, state


def settings(**changes):
    defaults = {
        "output_dir": "o", "learning_rate": RATE, "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0, "max_grad_norm": 3.0,
    }  # fmt: skip
    return TrainConfig(**defaults | changes)


FIELDS = {
    "every linear": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "dora, an embedding, its head and a norm": {
        "target_modules": ["v_proj", "embed_tokens"],
        "use_dora": True,
        "modules_to_save": ["lm_head"],
    },
    "lora_bias, a trained norm": {
        "target_modules": ["k_proj"],
        "lora_bias": True,
        "modules_to_save": ["model.norm", "embed_tokens"],
    },
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_loraplus_steps_match_peft(fields):
    decay = 0.0 if "model.norm" in fields.get("modules_to_save", ()) else 0.3
    model, _ = make_model(**fields)
    peft_optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=8.0, loraplus_lr_embedding=5e-4,
        loraplus_weight_decay=decay, betas=(0.9, 0.99), eps=1e-7,
    )  # fmt: skip
    train_config = settings(
        loraplus_lr_ratio=8.0, loraplus_lr_embedding=5e-4, weight_decay=decay, adam_beta2=0.99,
        adam_epsilon=1e-7,
    )  # fmt: skip
    _, expected, actual, _ = train_both(model, LoraConfig(), peft_optimizer, train_config)
    assert set(actual) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=1e-5, atol=2e-6, err_msg=str(path))


@pytest.mark.parametrize("rslora", [False, True])
def test_lorafa_steps_match_peft(rslora, monkeypatch):
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else peft rounds to bfloat16
    fields = {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": rslora,
        "alpha_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"], "bias": "all",
    }  # fmt: skip
    model, _ = make_model(**fields)
    peft_optimizer = create_lorafa_optimizer(model, 4, 6, RATE)
    # peft adds epsilon before the bias correction of AdamW.
    peft_optimizer.param_groups[0]["eps"] = 1e-12
    config = LoraConfig(**fields)
    start, expected, actual, state = train_both(
        model, config, peft_optimizer, settings(lorafa=True, adam_epsilon=1e-12)
    )
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=1e-5, atol=2e-6, err_msg=str(path))
    before = dict(paths.walk(to_tree(start)))
    for path, value in before.items():
        same = np.array_equal(actual[path], value)
        assert same == (path[-1] == "lora_A"), path
    # The state has nothing for A: two moments of every other parameter, and the inverses.
    moments = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    others = [x.shape for path, x in before.items() if path[-1] != "lora_A"]
    inverses = [(2, 4, 4)] * 2
    assert sorted(moments) == sorted(others * 2 + inverses)


def test_lorafa_in_layers_of_different_rank():
    """Columns of A beyond a layer's rank have no effect, and the same rows of B stay zero."""
    model, _ = make_model(r=2, target_modules=["q_proj"])
    config = LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={r"layers\.1\..*q_proj": 2})
    weights = to_tree({n: p.detach().numpy() for n, p in model.named_parameters() if "lora_" in n})
    q = weights["model"]["layers"]["self_attn"]["q_proj"]
    adapter = Adapter(
        paths.nest({
            ("model", "layers", "self_attn", "q_proj", "lora_A"): jnp.pad(
                q["lora_A"], ((0, 0), (0, 0), (0, 1))
            ).at[0, :, 2].set(jnp.arange(16.0)),
            ("model", "layers", "self_attn", "q_proj", "lora_B"): jnp.pad(
                q["lora_B"], ((0, 0), (0, 1), (0, 0))
            ),
        }),
        config,
    )  # fmt: skip
    gradient = jax.tree.map(jnp.zeros_like, adapter)
    node = gradient.weights["model"]["layers"]["self_attn"]["q_proj"]
    node["lora_B"] = node["lora_B"].at[1, :2].set(1.0)
    transform = precondition_b()
    got, _ = transform.update(gradient, transform.init(adapter))
    b = got.weights["model"]["layers"]["self_attn"]["q_proj"]["lora_B"]
    a = np.asarray(q["lora_A"], np.float64)[1]
    expected = np.linalg.inv(a.T @ a) @ np.ones((2, 16)) / 4.0**2  # lora_alpha / r of this layer
    np.testing.assert_allclose(b[1, :2], expected, rtol=2e-5)
    assert not np.any(b[1, 2]) and not np.any(b[0])
