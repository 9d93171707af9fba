"""Models compared with transformers in eager float32, and folders exchanged with it."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, LENGTH, build, run, tokens
from tiny_peers import PEERS_TALK, load_torch, peft, torch, transformers

import jlora
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.lora.targets import find_targets

pytestmark = PEERS_TALK
EVERY_MODEL = pytest.mark.parametrize("name", CONFIGS)


def torch_logits(torch_model, ids, **inputs):
    with torch.no_grad():
        inputs = {k: torch.tensor(v) for k, v in inputs.items()}
        return torch_model(torch.tensor(ids), **inputs).logits.numpy()


def assert_close(got, want, bound=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(want).max() > 1, "logits must spread for the comparison to mean something"
    assert np.abs(got - want).max() < bound * np.abs(want).max()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name → (model, params, transformers' model loaded from jlora's folder); each is made once."""
    cache = {}

    def get(name):
        if name not in cache:
            folder = tmp_path_factory.mktemp(name)
            model, params = build(name)
            save_pretrained(folder, model, params, max_shard_size="20KB")
            cache[name] = model, params, load_torch(folder)
        return cache[name]

    return get


@EVERY_MODEL
def test_logits_match_transformers(pair, name):
    model, params, torch_model = pair(name)
    ids = tokens(model, 2, LENGTH)
    assert_close(run(model, params, ids), torch_logits(torch_model, ids))


@EVERY_MODEL
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # for experts
def test_adapted_modules_match_peft(pair, name):
    model, params, torch_model = pair(name)
    kind = model.config.model_type
    if model.config.mlp_only_layers:
        pytest.skip("peft 0.21 takes the names of these layers' projections for those of experts")
    default = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if kind == "mixtral":  # peft clears its default, and then matches no module
        default = None
    for target_modules in ("all-linear", *([None] if default else [])):
        config = peft.LoraConfig(target_modules=target_modules, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(copy.deepcopy(torch_model), config)
        _, targets = find_targets(params, jlora.LoraConfig(target_modules=target_modules))
        names = [name for target in targets for name in target.names]
        assert sorted(names) == sorted(adapted.targeted_module_names)


@EVERY_MODEL
def test_folders_that_transformers_saved_hold_the_same_parameters(pair, name, tmp_path):
    model, params, torch_model = pair(name)
    torch_model.save_pretrained(tmp_path)
    loaded, loaded_params = load_pretrained(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
    expected, actual = (
        dataclasses.replace(m.config, hf_json="", generation_json="") for m in (model, loaded)
    )
    assert expected == actual


@EVERY_MODEL
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_of_transformers(pair, name, side):
    model, params, torch_model = pair(name)
    ids, mask = tokens(model, 2, LENGTH), np.ones((2, LENGTH), np.int32)
    mask[0, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    got = run(model, params, ids, positions, mask)
    want = torch_logits(
        torch_model, ids, attention_mask=mask, position_ids=positions.astype(np.int64)
    )
    assert_close(got[mask > 0], want[mask > 0])


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_greedy_decoding_matches_transformers(pair, name):
    model, params, torch_model = pair(name)
    prompt = tokens(model, 1, 6)
    want = torch_model.generate(
        torch.tensor(prompt),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    cache = model.init_cache(1, 16)
    last, cache = model.decode(params, prompt, None, cache, last_only=True)
    row = list(prompt[0])
    for _ in range(10):
        row.append(int(jnp.argmax(last[0])))
        last, cache = model.decode(params, np.array([[row[-1]]]), None, cache, last_only=True)
    np.testing.assert_array_equal(row, want[0])


@pytest.mark.parametrize("name", ["llama-rope", "qwen3", "gpt2"])
def test_gradients_match_torch(pair, name):
    model, params, torch_model = pair(name)
    ids = tokens(model, 2, LENGTH)
    node, leaf = {"gpt2": ("transformer", "wpe")}.get(name, ("model", "norm"))
    key = "embedding" if leaf == "wpe" else "scale"

    def loss(value):
        tree = {**params, node: {**params[node], leaf: {key: value}}}
        return jnp.mean(jnp.sin(model(tree, ids)))

    got = jax.grad(loss)(params[node][leaf][key])
    torch_model.zero_grad()
    torch_model(torch.tensor(ids)).logits.sin().mean().backward()
    want = getattr(getattr(torch_model, node), leaf).weight.grad.numpy()
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["stories260k", "slm4096-gpt2"])
def test_public_models_have_the_logits_of_transformers(assets, tmp_path, name):
    folder = assets / "models" / name
    model, params = load_pretrained(folder, dtype="float32")
    ids = tokens(model, 2, 100)
    want = torch_logits(load_torch(folder), ids)
    assert_close(model(params, ids), want)
    save_pretrained(tmp_path, model, params)
    np.testing.assert_array_equal(torch_logits(load_torch(tmp_path), ids), want)


def test_transformers_reads_bfloat16_weights_exactly(tmp_path):
    model, params = build("llama")
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_pretrained(tmp_path, model, cast)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch_model.dtype == torch.bfloat16
    weight = torch_model.lm_head.weight.detach().float().numpy()
    np.testing.assert_array_equal(weight.T, np.asarray(cast["lm_head"]["kernel"], np.float32))
