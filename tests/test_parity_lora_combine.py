"""Weighted combinations against peft's: every type, on linear layers and GPT-2's Conv1D."""

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

# Two of equal rank, where one lacks a module and a layer of the other; a third of other ranks.
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
    """(base, peft's model with all adapters, the same read by jlora)."""
    base = make_base(request.param, tmp_path_factory.mktemp("base"))
    fields = FIELDS[request.param]
    folder, ours = tmp_path_factory.mktemp("adapters"), {}
    theirs = make_peft(base, fields["default"])
    for name in ("second", "third"):
        theirs.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **fields[name]))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "second" in name or "third" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    theirs.save_pretrained(folder)
    for name in fields:
        ours[name] = jlora.load_adapter(folder / name.replace("default", "."), base.params)
    return base, theirs, ours


def theirs_combined(model, names, weights, **options):
    """peft's result by module: (A (in, r), B (r, out), delta (in, out)) in float64."""
    model.add_weighted_adapter(names, weights, "mix", **options)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if "mix" in getattr(module, "lora_A", {}):
            a = module.lora_A["mix"].weight.detach().numpy().T
            b = module.lora_B["mix"].weight.detach().numpy().T
            delta = module.get_delta_weight("mix").detach().numpy()
            delta = delta if type(module.get_base_layer()).__name__ == "Conv1D" else delta.T
            found[name] = a, b, delta
    model.delete_adapter("mix")
    return found


def by_module(adapter):
    """The same of one of ours, by its config's ranks and scales."""
    found = {}
    for f in adapter_factors(adapter).values():
        for i, (name, r) in enumerate(zip(f.leaf.modules(), f.ranks, strict=True)):
            a, b = np.asarray(f.a[i], np.float64), np.asarray(f.b[i], np.float64)
            assert not a[:, r:].any() and not b[r:].any()
            if r:
                found[name] = a[:, :r], b[:r], f.scales[i] * a[:, :r] @ b[:r]
    return found


def check(got, want, factors_too, tolerance=1e-5):
    assert set(got) == set(want)
    for name, (a, b, delta) in want.items():
        assert_close(got[name][2], delta, tolerance, name)
        if factors_too:  # what peft adds beyond the ranks there are is zero
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
def test_combinations_are_pefts(peers, kind, options):
    _, model, ours = peers
    names = list(ours)[: 2 if kind in BY_FACTOR else 3]
    weights = WEIGHTS[: len(names)]
    want = theirs_combined(model, names, weights, combination_type=kind, **options)
    result = jlora.add_weighted_adapter([ours[n] for n in names], weights, kind, **options)
    # Where the spectrum is cut, float32 rounding is magnified by one over the gap between singular
    # values, and differs between LAPACK's kernels for different CPUs (1.05e-5 has been seen).
    tolerance = 2e-5 if "svd_rank" in options else 1e-5
    check(by_module(result), want, kind in BY_FACTOR | {"cat"}, tolerance)
    if kind != "cat":  # there peft has columns for adapters that lack a module, too
        assert result.config.r == next(iter(want.values()))[0].shape[1]


@pytest.fixture
def same_masks(monkeypatch):
    """One mask on both sides: a function of the adapter's place and of both indices, symmetric."""

    def mask(place, rows, columns):
        i, j = np.ogrid[:rows, :columns]
        return (3 * (i + j) + i * j + place) % 7 < 4

    def ours(_, shape, density):
        return jax.numpy.stack([jax.numpy.asarray(mask(k, *shape[1:])) for k in range(shape[0])])

    module, places = peft.tuners.lora.model, {}

    def theirs(tensor, density, rescale):
        assert rescale
        return tensor * torch.tensor(mask(next(places["of"]), *tensor.shape)) / density

    def counted(function):
        def run(*arguments):
            places["of"] = itertools.count()
            return function(*arguments)

        return run

    monkeypatch.setattr(pruning, "random_mask", ours)
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", theirs)
    for name in ("dare_linear", "dare_ties"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    yield
    weighted._merge_layers.clear_cache()
    weighted._merge_products.clear_cache()


@pytest.mark.parametrize("kind", [kind for kind in PRUNES if kind.startswith("dare")])
def test_dare_is_pefts_given_the_same_draws(peers, kind, same_masks):
    _, model, ours = peers
    # The adapter that lacks a layer comes last, so that places are the same in all layers.
    names = ["default", "second"] if kind in BY_FACTOR else ["default", "third", "second"]
    weights = WEIGHTS[: len(names)]
    want = theirs_combined(model, names, weights, combination_type=kind, density=0.57)
    result = jlora.add_weighted_adapter(
        [ours[n] for n in names], weights, kind, density=0.57, key=jax.random.key(0)
    )
    check(by_module(result), want, kind in BY_FACTOR)


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_peft_loads_what_was_combined(peers, kind, tmp_path):
    base, _, ours = peers
    ours = list(ours.values())[: 2 if kind == "linear" else 3]
    result = jlora.add_weighted_adapter(ours, WEIGHTS[: len(ours)], kind)
    jlora.save_adapter(tmp_path, result)
    again = peft.PeftModel.from_pretrained(make_peft(base, {}).unload(), tmp_path)
    assert_close(jlora_logits(base, base.params, result), torch_logits(again), 1e-5)
    if kind == "cat":  # exact: the sum of what the adapters do to every weight
        want = {}
        for adapter, weight in zip(ours, WEIGHTS, strict=True):
            for name, (_, _, delta) in by_module(adapter).items():
                want[name] = want.get(name, 0) + weight * delta
        got = by_module(jlora.load_adapter(tmp_path, base.params))
        for name, delta in want.items():
            assert_close(got[name][2], delta, 1e-6, name)


def test_peft_refuses_unequal_ranks_where_we_do(peers):
    _, model, ours = peers
    for kind in sorted(BY_FACTOR - {"linear"}):
        with pytest.raises(ConfigError, match=r"has ranks \(4, [235]\)"):
            jlora.add_weighted_adapter(
                [ours["default"], ours["third"]], [1, 1], kind, density=0.5, key=jax.random.key(0)
            )
        with pytest.raises(ValueError, match="must have the same r"):
            model.add_weighted_adapter(["default", "third"], [1, 1], "mix", kind, density=0.5)
