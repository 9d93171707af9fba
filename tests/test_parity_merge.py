"""``jlora merge`` on a folder that PEFT wrote, against ``merge_and_unload``."""

import numpy as np
from safetensors.numpy import load_file
from tiny_peers import PEERS_TALK, peft, torch, transformers
from tiny_runs import OFF

from jlora import cli

pytestmark = PEERS_TALK


def test_a_folder_of_peft_merges_as_in_peft(tiny_base, tmp_path):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "adapter")
    assert cli.main("merge", [str(tmp_path / "adapter"), OFF]) == 0
    merged = load_file(tmp_path / "adapter" / "merged" / "model.safetensors")
    wanted = model.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(merged[name], value.numpy(), rtol=1e-5, atol=1e-6)
