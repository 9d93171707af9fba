"""Weighted combinations compared with peft: every type, on linear layers and GPT-2's Conv1D."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from tiny_peers import (
    PEERS_TALK,
    assert_close,
    jlora_logits,
    make_base,
    make_peft,
    peft,
    torch,
    torch_logits,
)

import jlora
from jlora.errors import ConfigError
from jlora.lora.combine import pruning, weighted
from jlora.lora.combine.factors import adapter_factors
from jlora.lora.combine.refusals import BY_FACTOR, PRUNES

pytestmark = PEERS_TALK

# The first two have equal rank, the second fewer modules and layers; the third has other ranks.
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "default": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]},
        "second": {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "layers_to_transform": [0, 2],
            "use_rslora": True,
        },
        "third": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {"o_proj": 2},
        },
    },
    "gpt2": {
        "default": {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"]},
        "second": {"r": 4, "target_modules": ["c_attn"]},
        "third": {"r": 2, "target_modules": ["c_attn"]},
    },
}


@pytest.fixture(scope="module", params=FIELDS)
def peers(request, tmp_path_factory):
    """(base, peft's model with all adapters, the same adapters read by jlora)."""
    base = make_base(request.param, tmp_path_factory.mktemp("base"))
    fields = FIELDS[request.param]
    folder, adapters = tmp_path_factory.mktemp("adapters"), {}
    peft_model = make_peft(base, fields["default"])
    for name in ("second", "third"):
        peft_model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **fields[name]))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "second" in name or "third" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    peft_model.save_pretrained(folder)
    for name in fields:
        adapters[name] = jlora.load_adapter(folder / name.replace("default", "."), base.params)
    return base, peft_model, adapters


def peft_combined(model, names, weights, **options):
    """peft's result by module: (A (in, r), B (r, out), delta (in, out)) in float64."""
    model.add_weighted_adapter(names, weights, "mix", **options)
    result = {}
    for name, module in model.base_model.model.named_modules():
        if "mix" in getattr(module, "lora_A", {}):
            a = module.lora_A["mix"].weight.detach().numpy().T
            b = module.lora_B["mix"].weight.detach().numpy().T
            delta = module.get_delta_weight("mix").detach().numpy()
            delta = delta if type(module.get_base_layer()).__name__ == "Conv1D" else delta.T
            result[name] = a, b, delta
    model.delete_adapter("mix")
    return result


def by_module(adapter):
    """The same for an adapter of jlora, without the columns that pad its ranks."""
    result = {}
    for f in adapter_factors(adapter).values():
        for i, (name, r) in enumerate(zip(f.leaf.modules(), f.ranks, strict=True)):
            a, b = np.asarray(f.a[i], np.float64), np.asarray(f.b[i], np.float64)
            assert not a[:, r:].any() and not b[r:].any()
            if r:
                result[name] = a[:, :r], b[:r], f.scales[i] * a[:, :r] @ b[:r]
    return result


def check(got, want, factors_too, tolerance=1e-5):
    assert set(got) == set(want)
    for name, (a, b, delta) in want.items():
        assert_close(got[name][2], delta, tolerance, name)
        if factors_too:  # beyond the rank, peft pads with zeros
            r = got[name][0].shape[1]
            assert_close(got[name][0], a[:, :r], 1e-5, name)
            assert_close(got[name][1], b[:r], 1e-5, name)
            assert not a[:, r:].any() and not b[r:].any()


WEIGHTS = [0.7, -1.3, 0.4]
CASES = [(kind, {}) for kind in ("linear", "cat", "svd")]
CASES += [(kind, {"density": 0.3}) for kind in ("magnitude_prune", "magnitude_prune_svd")]
CASES += [(kind, {"density": 0.6}) for kind in ("ties", "ties_svd")]
CASES += [
    ("svd", {"svd_rank": 2}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.6, "majority_sign_method": "frequency", "svd_rank": 7}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_combinations_match_peft(peers, kind, options):
    _, model, adapters = peers
    names = list(adapters)[: 2 if kind in BY_FACTOR else 3]
    weights = WEIGHTS[: len(names)]
    want = peft_combined(model, names, weights, combination_type=kind, **options)
    result = jlora.add_weighted_adapter([adapters[n] for n in names], weights, kind, **options)
    # Where the spectrum is cut, float32 rounding is magnified by one over the gap between singular
    # values, and differs between LAPACK's kernels for different CPUs (1.05e-5 has been seen).
    tolerance = 2e-5 if kind.endswith("svd") else 1e-5
    check(by_module(result), want, kind in BY_FACTOR | {"cat"}, tolerance)
    if kind != "cat":  # where peft also has columns for adapters that lack a module
        assert result.config.r == next(iter(want.values()))[0].shape[1]


@pytest.fixture
def same_masks(monkeypatch):
    """Both libraries prune by one mask, a symmetric function of adapter index, row and column."""

    def mask(adapter_index, rows, columns):
        i, j = np.ogrid[:rows, :columns]
        return (3 * (i + j) + i * j + adapter_index) % 7 < 4

    def jlora_mask(_, shape, density):
        return jax.numpy.stack([jax.numpy.asarray(mask(k, *shape[1:])) for k in range(shape[0])])

    module, counters = peft.tuners.lora.model, {}

    def peft_pruning(tensor, density, rescale):
        assert rescale
        return tensor * torch.tensor(mask(next(counters["of"]), *tensor.shape)) / density

    def counted(function):
        def run(*arguments):
            counters["of"] = itertools.count()
            return function(*arguments)

        return run

    monkeypatch.setattr(pruning, "random_mask", jlora_mask)
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", peft_pruning)
    for name in ("dare_linear", "dare_ties"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    yield
    weighted._merge_layers.clear_cache()
    weighted._merge_products.clear_cache()


@pytest.mark.parametrize("kind", [kind for kind in PRUNES if kind.startswith("dare")])
def test_dare_matches_peft_given_the_same_masks(peers, kind, same_masks):
    _, model, adapters = peers
    # The adapter that lacks a layer is last, so that adapter indices are the same in all layers.
    names = ["default", "second"] if kind in BY_FACTOR else ["default", "third", "second"]
    weights = WEIGHTS[: len(names)]
    want = peft_combined(model, names, weights, combination_type=kind, density=0.57)
    result = jlora.add_weighted_adapter(
        [adapters[n] for n in names], weights, kind, density=0.57, key=jax.random.key(0)
    )
    check(by_module(result), want, kind in BY_FACTOR)


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_peft_loads_a_combined_adapter(peers, kind, tmp_path):
    base, _, adapters = peers
    adapters = list(adapters.values())[: 2 if kind == "linear" else 3]
    result = jlora.add_weighted_adapter(adapters, WEIGHTS[: len(adapters)], kind)
    jlora.save_adapter(tmp_path, result)
    reloaded = peft.PeftModel.from_pretrained(make_peft(base, {}).unload(), tmp_path)
    assert_close(jlora_logits(base, base.params, result), torch_logits(reloaded), 1e-5)
    if kind == "cat":  # exact: the weighted sum of the adapters' deltas
        want = {}
        for adapter, weight in zip(adapters, WEIGHTS, strict=True):
            for name, (_, _, delta) in by_module(adapter).items():
                want[name] = want.get(name, 0) + weight * delta
        got = by_module(jlora.load_adapter(tmp_path, base.params))
        for name, delta in want.items():
            assert_close(got[name][2], delta, 1e-6, name)


def test_unequal_ranks_are_refused_as_in_peft(peers):
    _, model, adapters = peers
    for kind in sorted(BY_FACTOR - {"linear"}):
        with pytest.raises(ConfigError, match=r"has ranks \(4, [235]\)"):
            jlora.add_weighted_adapter(
                [adapters["default"], adapters["third"]],
                [1, 1],
                kind,
                density=0.5,
                key=jax.random.key(0),
            )
        with pytest.raises(ValueError, match="must have the same r"):
            model.add_weighted_adapter(["default", "third"], [1, 1], "mix", kind, density=0.5)
