"""Models against transformers' eager float32 ones, and its reading of the folders we write."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, LENGTH, build, run, tokens
from tiny_peers import PEERS_TALK, peft, torch, transformers

import jlora
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.lora.targets import find_targets

pytestmark = PEERS_TALK
EVERY = pytest.mark.parametrize("name", CONFIGS)


def load_torch(folder):
    """transformers' model of a folder; asserts that nothing was missing or unexpected."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(theirs, ids, **inputs):
    with torch.no_grad():
        inputs = {k: torch.tensor(v) for k, v in inputs.items()}
        return theirs(torch.tensor(ids), **inputs).logits.numpy()


def assert_close(got, want, bound=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(want).max() > 1, "logits must spread for the comparison to mean something"
    assert np.abs(got - want).max() < bound * np.abs(want).max()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name → (model, params, transformers' model of the folder we wrote), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model, params = build(name)
            save_pretrained(folder, model, params, max_shard_size="20KB")
            made[name] = model, params, load_torch(folder)
        return made[name]

    return get


@EVERY
def test_logits_are_those_of_transformers(pair, name):
    model, params, theirs = pair(name)
    ids = tokens(model, 2, LENGTH)
    assert_close(run(model, params, ids), logits(theirs, ids))


@EVERY
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of mixtures
def test_adapted_modules_are_those_of_peft(pair, name):
    model, params, theirs = pair(name)
    kind = model.config.model_type
    default = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if kind == "mixtral":  # peft empties its own default, and then finds nothing
        default = None
    for wanted in ("all-linear", *([None] if default else [])):
        config = peft.LoraConfig(target_modules=wanted, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(copy.deepcopy(theirs), config)
        _, targets = find_targets(params, jlora.LoraConfig(target_modules=wanted))
        names = [name for target in targets for name in target.names]
        assert sorted(names) == sorted(adapted.targeted_module_names)


@EVERY
def test_folders_that_transformers_saved_hold_the_same_parameters(pair, name, tmp_path):
    model, params, theirs = pair(name)
    theirs.save_pretrained(tmp_path)
    again, read = load_pretrained(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    ours, saved = (dataclasses.replace(m.config, hf_json="") for m in (model, again))
    assert ours == saved


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_of_transformers(pair, name, side):
    model, params, theirs = pair(name)
    ids, mask = tokens(model, 2, LENGTH), np.ones((2, LENGTH), np.int32)
    mask[0, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    got = run(model, params, ids, positions, mask)
    want = logits(theirs, ids, attention_mask=mask, position_ids=positions.astype(np.int64))
    assert_close(got[mask > 0], want[mask > 0])


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_greedy_decoding_is_that_of_transformers(pair, name):
    model, params, theirs = pair(name)
    prompt = tokens(model, 1, 6)
    want = theirs.generate(
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
def test_gradients_are_those_of_torch(pair, name):
    model, params, theirs = pair(name)
    ids = tokens(model, 2, LENGTH)
    node, leaf = {"gpt2": ("transformer", "wpe")}.get(name, ("model", "norm"))
    key = "embedding" if leaf == "wpe" else "scale"

    def loss(value):
        tree = {**params, node: {**params[node], leaf: {key: value}}}
        return jnp.mean(jnp.sin(model(tree, ids)))

    got = jax.grad(loss)(params[node][leaf][key])
    theirs.zero_grad()
    theirs(torch.tensor(ids)).logits.sin().mean().backward()
    want = getattr(getattr(theirs, node), leaf).weight.grad.numpy()
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["stories260k", "slm4096-gpt2"])
def test_public_models_have_the_logits_of_transformers(assets, tmp_path, name):
    folder = assets / "models" / name
    model, params = load_pretrained(folder, dtype="float32")
    ids = tokens(model, 2, 100)
    want = logits(load_torch(folder), ids)
    assert_close(model(params, ids), want)
    save_pretrained(tmp_path, model, params)
    np.testing.assert_array_equal(logits(load_torch(tmp_path), ids), want)


def test_bfloat16_weights_are_written_for_transformers(tmp_path):
    model, params = build("llama")
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_pretrained(tmp_path, model, cast)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    weight = theirs.lm_head.weight.detach().float().numpy()
    np.testing.assert_array_equal(weight.T, np.asarray(cast["lm_head"]["kernel"], np.float32))
