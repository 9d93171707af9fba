"""EVA compared with peft on the same tokens, and with NumPy's SVD of the collected inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_peers import IDS, PEERS_TALK, assert_close, copy, make_base, peft, torch

import jlora
from jlora.errors import ConfigError
from jlora.io import peft as adapter_io

pytestmark = [*PEERS_TALK, pytest.mark.filterwarnings("ignore:the following layers were init")]

NAMES = ["q_proj", "o_proj", "down_proj"]
MASK = np.ones(IDS.shape, bool)
MASK[1, 7:] = False
"""Padding of the second row."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def inputs(base):
    """Module → its input in torch's model, (tokens without padding, features), in float64."""
    recorded = {}

    def recorder(name):
        def hook(module, arguments, out):
            recorded[name] = arguments[0].detach().numpy()[MASK].astype(np.float64)

        return hook

    modules = [(n, m) for n, m in base.module.named_modules() if n.split(".")[-1] in NAMES]
    hooks = [m.register_forward_hook(recorder(n)) for n, m in modules]
    with torch.no_grad():
        base.module(input_ids=torch.tensor(IDS).long(), attention_mask=torch.tensor(MASK).long())
    for hook in hooks:
        hook.remove()
    return recorded


def eva_adapter(base, **eva):
    config = jlora.LoraConfig(
        r=3, lora_alpha=6, target_modules=NAMES, init_lora_weights="eva", eva_config=eva
    )

    def loss(params, ids):
        logits = base.model(params, ids)
        return jnp.sum(jnp.sin(logits))

    rows = [(jnp.asarray(IDS[i : i + 1]), jnp.asarray(MASK[i : i + 1])) for i in (0, 1)]
    return jlora.eva(jax.random.key(0), loss, base.params, rows, config)


def a_by_module(adapter):
    tensors = adapter_io.to_peft_tensors(adapter)
    a = {n.split("base_model.model.")[1]: x for n, x in tensors.items() if "lora_A" in n}
    assert not any(np.any(x) for n, x in tensors.items() if "lora_B" in n)
    return {n.removesuffix(".lora_A.weight"): x for n, x in a.items()}


@pytest.fixture(scope="module")
def precise(base):
    return eva_adapter(base, tau=0.999999)


def test_directions_and_ranks_match_the_svd_of_the_collected_inputs(base, inputs, precise):
    shares, components = [], {}
    for name, x in inputs.items():
        _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
        components[name] = vt
        shares += [(share, name) for share in (s**2 / np.sum(s**2))[:6]]
    chosen = [name for _, name in sorted(shares, reverse=True)[: 3 * len(inputs)]]
    want = {name: chosen.count(name) for name in inputs if chosen.count(name)}
    got = a_by_module(precise)
    assert {name: len(a) for name, a in got.items()} == want
    assert len(set(want.values())) > 1, "ranks must differ between modules"
    for name, a in got.items():
        cosines = np.abs(np.sum(a * components[name][: len(a)], axis=1))
        assert cosines.min() > 0.999, name


def test_ranks_and_directions_match_peft(base, precise):
    fields = {"r": 3, "lora_alpha": 6, "target_modules": NAMES, "init_lora_weights": "eva"}
    config = peft.LoraConfig(
        **fields, task_type="CAUSAL_LM", eva_config=peft.EvaConfig(rho=2.0, tau=0.9999)
    )
    peft_model = peft.get_peft_model(copy.deepcopy(base.module), config, low_cpu_mem_usage=True)
    batch = {
        "input_ids": torch.tensor(IDS).long(),
        "attention_mask": torch.tensor(MASK).long(),
    }
    peft.initialize_lora_eva_weights(peft_model, [batch], show_progress_bar=False)
    want = {
        n.split("base_model.model.")[1].removesuffix(".lora_A.weight"): x.numpy()
        for n, x in peft.get_peft_model_state_dict(peft_model).items()
        if "lora_A" in n
    }
    got = a_by_module(precise)
    assert {n: len(a) for n, a in got.items()} == {n: len(a) for n, a in want.items()}
    for name, a in got.items():
        assert np.abs(np.sum(a * want[name], axis=1)).min() > 0.99, name
    assert dict(precise.config.alpha_pattern) == peft_model.peft_config["default"].alpha_pattern
    assert precise.config.init_lora_weights is True


def test_without_redistribution_and_whitened(base, inputs):
    plain, white = (
        eva_adapter(base, rho=1.0, tau=0.9999),
        eva_adapter(base, rho=1.0, tau=0.9999, whiten=True),
    )
    got = a_by_module(white)
    for name, a in a_by_module(plain).items():
        assert len(a) == 3
        x = inputs[name]
        s = np.linalg.svd(x - x.mean(0), compute_uv=False)[:3]
        assert_close(got[name], a / np.sqrt(s)[:, None], 1e-4)
    assert not plain.config.rank_pattern and not plain.config.alpha_pattern


def test_more_ranks_than_tokens_are_refused(base):
    config = jlora.LoraConfig(r=12, target_modules=["q_proj"], init_lora_weights="eva")
    with pytest.raises(ConfigError, match="may get 24 ranks"):
        jlora.eva(jax.random.key(0), lambda p, x: x, base.params, [(IDS, MASK)], config)
    with pytest.raises(ConfigError, match="eva needs data"):
        jlora.init_adapter(jax.random.key(0), base.params, dataclasses.replace(config, r=2))
