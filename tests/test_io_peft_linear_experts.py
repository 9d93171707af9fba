"""Adapters of mixtures of transformers 4, where experts and routers were linear layers."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import CONFIGS, build, run, tokens

import jlora
from jlora.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
)
from jlora.errors import ConfigError, DataError
from jlora.io.peft import abstract_adapter_from_folder
from jlora.run.init_from import with_settings_of
from jlora.run.job import with_base_name
from jlora.tree import paths

PREFIX = "base_model.model."
NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen2_moe-mlp-first": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""The names of the mixture, and of gate, up and down in an expert."""


def sparse_layers(params):
    """Layer number, its run's parameters of the mixture, the index in the run."""
    for leaf in paths.leaves(params):
        if leaf.path[-1] == "gate_up_proj":
            node = paths.get(params, leaf.path[:-2])
            for i, name in enumerate(leaf.modules()):
                yield int(name.split(".")[2]), node, i


def linear_layers(name, params):
    """Module of transformers 4 → (its matrix as a writable view [out, in] of the result, …)."""
    dense = jax.tree.map(np.array, params)
    block, (gate, up, down) = NAMES[name]
    found = {}
    for layer, mlp, i in sparse_layers(dense):
        front = f"model.layers.{layer}.{block}"
        found[f"{front}.gate"] = mlp["gate"]["weight"][i]
        for e, (both, last) in enumerate(
            zip(mlp["experts"]["gate_up_proj"][i], mlp["experts"]["down_proj"][i], strict=True)
        ):
            half = len(both) // 2
            found[f"{front}.experts.{e}.{gate}"] = both[:half]
            found[f"{front}.experts.{e}.{up}"] = both[half:]
            found[f"{front}.experts.{e}.{down}"] = last
    for leaf in paths.leaves(dense):
        if leaf.kind == "kernel":
            for i, module in enumerate(leaf.modules()):
                found[module] = (leaf.value[i] if leaf.stack else leaf.value).T
    return dense, found


def write_folder(folder, name, config, **choices):
    """The model, its parameters, and what ``write_linear_experts`` returns."""
    model, params = build(name)
    return model, params, *write_linear_experts(folder, name, config, params, **choices)


def write_linear_experts(
    folder, name, config, params, chosen, rank=lambda module: 2, scale=lambda module: 2.0
):
    """An old folder that adapts the ``chosen`` modules; the merged parameters, and the tensors."""
    dense, layers = linear_layers(name, params)
    rng, tensors = np.random.default_rng(0), {}
    for module, matrix in layers.items():
        if not chosen(module):
            continue
        r = rank(module)
        a = (0.3 * rng.standard_normal((r, matrix.shape[1]))).astype(np.float32)
        b = (0.3 * rng.standard_normal((matrix.shape[0], r))).astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b
        matrix += scale(module) * b @ a
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.05, **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return dense, tensors


def check(folder, model, params, dense):
    """The loaded adapter gives the logits of the dense sum; the abstract one has its shapes."""
    adapter = jlora.load_adapter(folder, params)
    ids = tokens(model, 2, 9)
    want = run(model, dense, ids)
    got = run(model, jlora.attach(params, adapter), ids)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - run(model, params, ids)).max() > 1e-3 * np.abs(want).max()
    abstract = abstract_adapter_from_folder(folder, model.shapes)
    assert jax.tree.map(lambda x: x.shape, adapter) == jax.tree.map(lambda x: x.shape, abstract)
    return adapter


def ends(*names):
    return lambda module: module.rpartition(".")[2] in names


@pytest.mark.parametrize("name", NAMES)
def test_experts_router_and_attention(name, tmp_path):
    _, matrices = NAMES[name]
    targets = ["q_proj", "v_proj", "gate", *matrices]
    folder = write_folder(tmp_path, name, {"target_modules": targets}, chosen=ends(*targets))
    adapter = check(tmp_path, *folder[:3])
    assert adapter.config.lora_dropout == 0  # PEFT refuses another for parameters
    wanted = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
    if name == "mixtral":
        assert set(adapter.config.target_modules) == {"q_proj", "v_proj"}
    if "mlp-first" not in name:
        assert set(adapter.config.target_parameters) == set(wanted)

    jlora.save_adapter(tmp_path / "again", adapter)
    again = jlora.load_adapter(tmp_path / "again", folder[1])
    assert jax.tree.all(jax.tree.map(np.array_equal, again.weights, adapter.weights))


CASES = {
    "one matrix, half of the fused one": (
        {"target_modules": ["w3"]},
        {"chosen": ends("w3")},
    ),
    "some experts": (
        {"target_modules": r".*experts\.[13]\.w[12]"},
        {"chosen": lambda m: m.rpartition(".")[0].endswith((".1", ".3")) and m[-1] in "12"},
    ),
    "one layer": (
        {"target_modules": ["w1", "w2", "w3", "gate"], "layers_to_transform": [1]},
        {"chosen": lambda m: "layers.1.block" in m},
    ),
    "ranks and scales by module": (
        {
            "target_modules": ["w1", "w2", "w3", "q_proj"],
            "rank_pattern": {"w1": 3, "experts.2.w2": 1},
            "alpha_pattern": {"w3": 5},
        },
        {
            "chosen": ends("w1", "w2", "w3", "q_proj"),
            "rank": lambda m: 3 if m[-1] == "1" else 1 if m.endswith("experts.2.w2") else 2,
            "scale": lambda m: (
                4 / 3 if m[-1] == "1" else 2.5 if m[-1] == "3" else 4 if "2.w2" in m[-5:] else 2
            ),
        },
    ),
    "rank-stabilized": (
        {"target_modules": ["w1", "w2", "w3"], "use_rslora": True},
        {"chosen": ends("w1", "w2", "w3"), "scale": lambda m: 4 / 2**0.5},
    ),
    "only the router": ({"target_modules": ["gate"]}, {"chosen": ends("gate")}),
    "without what is excluded": (
        {"target_modules": ["w1", "w2", "w3"], "exclude_modules": ["experts.0.w1"]},
        {"chosen": lambda m: ends("w1", "w2", "w3")(m) and "experts.0.w1" not in m},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_then_could_be_chosen(case, tmp_path):
    config, choices = CASES[case]
    _, params, dense, _ = write_folder(tmp_path, "mixtral", config, **choices)
    merged = dict(paths.walk(jlora.merge(params, jlora.load_adapter(tmp_path, params))))
    for path, want in paths.walk(dense):
        np.testing.assert_allclose(merged[path], want, atol=1e-5, err_msg=str(path))


def test_experts_beside_dense_layers_of_the_same_name(tmp_path):
    """Qwen's shared expert, and its layers without a mixture, have linear layers to this day."""
    config, name = {"target_modules": ["up_proj"]}, "qwen2_moe-mlp-first"
    folder = write_folder(tmp_path, name, config, chosen=ends("up_proj"))
    assert {k.split(".")[6] for k in folder[3]} == {"up_proj", "experts", "shared_expert"}
    check(tmp_path, *folder[:3])


def test_what_does_not_fit_is_listed(tmp_path):
    targets = ends("w1", "w2", "w3")
    config = {"target_modules": ["w1", "w2", "w3"]}
    _, params, _, tensors = write_folder(tmp_path, "mixtral", config, chosen=targets)
    front = f"{PREFIX}model.layers.0.block_sparse_moe.experts"
    del tensors[f"{front}.2.w1.lora_B.weight"]
    tensors[f"{front}.1.w2.lora_A.weight"] = np.zeros((3, 48), np.float32)
    number = CONFIGS["mixtral"]["num_local_experts"]
    tensors[f"{front}.{number}.w1.lora_A.weight"] = np.zeros((2, 32), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError) as caught:
        jlora.load_adapter(tmp_path, params)
    for part in (
        f"missing {front}.2.w1.lora_B.weight",
        f"{front}.1.w2.lora_A.weight has shape (3, 48), expected (2, 48)",
        f"unknown {front}.{number}.w1.lora_A.weight",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["use_dora", "lora_bias"])
def test_what_parameters_cannot_have_is_an_error(key, tmp_path):
    config = {"target_modules": ["w2"], key: True}
    _, params, *_ = write_folder(tmp_path, "mixtral", config, chosen=ends("w2"))
    with pytest.raises(ConfigError, match=f"{key}: is not possible for experts and routers"):
        jlora.load_adapter(tmp_path, params)


def test_a_router_trained_in_full_had_another_name(tmp_path):
    config = {"target_modules": ["w2"], "modules_to_save": ["gate"]}
    _, params, _, tensors = write_folder(tmp_path, "mixtral", config, chosen=ends("w2"))
    router = np.full((4, 32), 0.5, np.float32)
    for i in range(2):
        tensors[f"{PREFIX}model.layers.{i}.block_sparse_moe.gate.weight"] = router
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = jlora.load_adapter(tmp_path, params)
    np.testing.assert_array_equal(
        adapter.weights["model"]["layers"]["mlp"]["gate"]["weight"][1], router
    )


def test_dropout_of_experts_is_refused_where_training_goes_on(tmp_path):
    """It would have no effect: the product of experts has no dropout."""
    config = {"target_modules": ["w2", "q_proj"]}
    _, params, *_ = write_folder(tmp_path, "mixtral", config, chosen=ends("w2", "q_proj"))
    adapter = jlora.load_adapter(tmp_path, params)
    settings = Config(
        model=ModelConfig(name_or_path="base"),
        lora=LoraConfig(init_from=str(tmp_path), lora_dropout=0.1),
        data=DataConfig(train=(SourceConfig(path=str(tmp_path), format="messages"),)),
        train=TrainConfig(output_dir="out"),
    )
    with pytest.raises(ConfigError, match="not possible for the experts") as caught:
        with_settings_of(settings, adapter.config, params)
    assert caught.value.where == "lora.lora_dropout"
    # As from the folder's own settings, which generate, merge and export take.
    assert with_base_name(settings, adapter).config.lora_dropout == 0
