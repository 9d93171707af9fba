"""The output of ``inspect``, compared with what a run holds and writes; it needs no weights."""

import json
import re
import shutil

import huggingface_hub
import jax
from safetensors.numpy import load_file
from tiny_runs import LLAMA

import jlora
from jlora import cli
from jlora.io import peft as adapter_io
from jlora.models import Model
from jlora.run import header

GPT2 = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2,
    "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def inspect(place, capsys, *overrides, **sections):
    """The command's exit code, output and errors; table columns are joined by one space."""
    code = cli.main("inspect", [str(place.write(**sections)), *overrides])
    captured = capsys.readouterr()
    return code, re.sub(r" {2,}", " ", captured.out), captured.err


def fresh(params, **fields):
    adapter = jlora.init_adapter(jax.random.key(0), params, jlora.LoraConfig(**fields))
    return adapter, sum(leaf.size for leaf in jax.tree.leaves(adapter))


def test_counts_and_sizes_match_the_run(place, capsys, tmp_path):
    """A quantized base and an adapter with saved modules: by hand, in the tree and in the file."""
    fields = {"r": 3, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["model.norm"]}
    quantization = {"llm_int8_skip_modules": ["o_proj"]}
    code, out, _ = inspect(place, capsys, lora=fields, quantization=quantization)
    assert code == 0
    settings = jlora.QuantConfig(**quantization)
    _, params = jlora.load_pretrained(place.base, "float32", quantization=settings)
    adapter, size = fresh(params, lora_alpha=8, **fields)
    assert size == 2 * 3 * (32 + 32) + 2 * 3 * (32 + 64) + 32
    every = sum(x.size for x in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "dequantize")))
    assert f"trainable {size:,} of {size + every:,} parameters" in out
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert f"memory {header.size_text(arrays)} frozen, {header.size_text(4 * size)} train" in out
    jlora.save_adapter(tmp_path, adapter)
    written = sum(x.nbytes for x in load_file(tmp_path / "adapter_model.safetensors").values())
    assert adapter_io.file_bytes(adapter) == written
    assert f"adapter file {header.size_text(written)}" in out
    assert f"adamw, {header.size_text(8 * size + 8)} of state" in out
    assert "model.layers.*.mlp.up_proj 2 32 × 64 3 2.66667 576" in out
    assert "model.norm.scale 1 32 32" in out
    assert "model.layers.*.self_attn.o_proj 2 32 × 32 float32 8.0 KiB" in out
    codes = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].nbytes
    assert f"self_attn.q_proj 2 32 × 32 nf4 {header.size_text(codes)}" in out


def test_config_json_is_enough(place, capsys, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(LLAMA))
    here = {"name_or_path": str(tmp_path / "bare")}
    _, with_weights, _ = inspect(place, capsys)
    code, without, _ = inspect(place, capsys, model=here)
    assert code == 0 and "adapter" in without
    assert with_weights.replace(str(place.base), "*") == without.replace(here["name_or_path"], "*")


def test_of_a_hub_model_only_the_description_is_downloaded(place, capsys, monkeypatch):
    def download(name, *, revision, allow_patterns, ignore_patterns):
        assert (name, revision) == ("someone/tiny", "v1")
        assert allow_patterns == ["config.json", "generation_config.json"]
        return str(place.base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    code, out, _ = inspect(place, capsys, "model.name_or_path=someone/tiny", "model.revision=v1")
    assert code == 0 and "base someone/tiny" in out


def test_every_pattern_without_a_match_is_listed(place, capsys):
    lora = {"target_modules": ["q_prj", "v_proj"], "rank_pattern": {"gate": 2}}
    lora |= {"modules_to_save": ["norn"], "exclude_modules": ["k_prj"]}
    quantization = {"llm_int8_skip_modules": ["o_prj"]}
    code, out, err = inspect(place, capsys, lora=lora, quantization=quantization)
    assert code == 2 and not out
    for name in ("q_prj", "gate", "norn", "k_prj", "o_prj"):
        assert f"'{name}'" in err, name


def test_scales_follow_the_patterns(place, capsys):
    lora = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 6, "use_rslora": True}
    lora |= {
        "rank_pattern": {"v_proj": 9, r"layers\.1\..*q_proj": 1},
        "alpha_pattern": {"v_proj": 3},
    }
    _, out, _ = inspect(place, capsys, lora=lora)
    assert "self_attn.q_proj 2 32 × 32 1–4 3–6 320" in out
    assert "self_attn.v_proj 2 32 × 16 9 1 864" in out


def test_full_fine_tuning(place, capsys):
    code, out, _ = inspect(place, capsys, lora=None, model={"dtype": "bfloat16"})
    params = Model.from_config(LLAMA).shapes
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert code == 0 and f"trainable {size:,} of {size:,} parameters (100.00%)" in out
    assert f"{header.size_text(4 * size)} trainable" in out and "all parameters, in float32" in out
    lines = out.splitlines()
    assert "adapter" not in lines and "trained in full" not in lines


def test_the_file_of_fused_parts_holds_whole_projections(tmp_path):
    """PEFT has one pair for GPT-2's fused projection, so its file is larger than the adapter."""
    model = Model.from_config(GPT2, "float32")
    adapter, size = fresh(model.shapes, r=2, target_modules=["q_proj", "v_proj"])
    jlora.save_adapter(tmp_path, adapter)
    written = load_file(tmp_path / "adapter_model.safetensors").values()
    assert adapter_io.file_bytes(adapter) == sum(x.nbytes for x in written) > 4 * size


def test_a_prequantized_base_is_not_trained_in_full(place, capsys):
    folder = place.folder / "quantized"
    shutil.copytree(place.base, folder)
    config = json.loads((folder / "config.json").read_text())
    quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization_config})
    )
    here = {"name_or_path": str(folder)}
    code, _, err = inspect(place, capsys, lora=None, model=here)
    assert code == 2 and "quantized weights cannot be trained in full" in err
    code, out, _ = inspect(place, capsys, model=here)
    assert code == 0 and "the base is already quantized" in out
