"""A batch whose rows use different adapters, compared with peft (``adapter_names=[…]``)."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_peers import (
    PEERS_TALK,
    assert_close,
    make_base,
    make_peft,
    peft,
    torch,
    torch_logits,
)

import jlora

pytestmark = PEERS_TALK

ADAPTERS = {
    "llama": {
        "fr": {"r": 4, "target_modules": "all-linear"},
        "de": {"r": 8, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
        "it": {"r": 2, "target_modules": ["embed_tokens", "v_proj"], "layers_to_transform": None},
    },
    "gpt2": {
        "fr": {"r": 4, "target_modules": ["c_attn"]},
        "de": {"r": 3, "use_rslora": True, "target_modules": ["wte", "mlp.c_proj"]},
        "it": {"r": 2, "target_modules": ["c_attn", "c_fc"], "lora_alpha": 20},
    },
}
NAMES = ["de", "__base__", "fr", "it", "fr"]
IDS = np.random.default_rng(0).integers(0, 64, (len(NAMES), 12), dtype=np.int32)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_mixed_batch_matches_peft(name, tmp_path):
    base = make_base(name, tmp_path / "base")
    peft_model = None
    for seed, (adapter, fields) in enumerate(ADAPTERS[name].items()):
        single = make_peft(base, fields, seed=seed)
        single.save_pretrained(tmp_path / adapter)
        if peft_model is None:
            module = copy.deepcopy(base.module)
            peft_model = peft.PeftModel.from_pretrained(module, tmp_path / adapter, adapter)
        else:
            peft_model.load_adapter(tmp_path / adapter, adapter)
    ids = torch.tensor(IDS).long()
    with torch.no_grad():
        want = peft_model.eval()(input_ids=ids, adapter_names=NAMES).logits.numpy()

    stack = jlora.stack_adapters(
        {n: jlora.load_adapter(tmp_path / n, base.params) for n in ADAPTERS[name]}
    )
    rows = stack.ids([None if n == "__base__" else n for n in NAMES])
    params = jlora.attach(base.params, stack, adapter_ids=rows)
    got = np.asarray(base.model(params, jnp.asarray(IDS)))
    assert_close(got, want, 1e-5)
    change = np.abs(got - torch_logits(base.module, IDS)).max((1, 2)) / np.abs(got).max()
    assert change[1] < 1e-5 and change[[0, 2, 3, 4]].min() > 1e-3
