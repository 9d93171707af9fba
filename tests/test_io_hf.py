"""Model folders: what is read, refused and written."""

import itertools
import json
import pickle
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA, build, each_family, run, tokens

from jlora.config import MeshConfig, QuantConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError, StorageError
from jlora.io.hf import folder as hf_folder
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.io.hf import read as hf_read
from jlora.io.hf.match import TensorMap
from jlora.io.hf.names import CheckpointTensor
from jlora.io.hf.placement import assemble_leaf
from jlora.quant import nf4
from jlora.quant.params import is_quantized, quantize_params
from jlora.tree import paths

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A llama folder with one shard."""
    save_pretrained(tmp_path / "m", *build("llama"))
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    """The same model in several shards."""
    save_pretrained(tmp_path / "s", *build("llama"), max_shard_size="16KB")
    return tmp_path / "s"


def edit(folder: Path, change) -> None:
    """Applies ``change(tensors)`` to ``model.safetensors``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@each_family()
@pytest.mark.parametrize("size", ["5GB", "16KB"])
def test_write_and_read_round_trip(tmp_path, name, size):
    model, params = build(name)
    files = save_pretrained(tmp_path, model, params, max_shard_size=size)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert (len(files) == 2) == (size == "5GB")
    again, read = load_pretrained(tmp_path, dtype="float32")
    same(read, params)
    assert again.config.windows == model.config.windows
    want = {**model.config.hf, "dtype": "float32"}
    assert {k: again.config.hf[k] for k in want} == want


def test_linear_weights_are_oriented_as_in_torch(tmp_path):
    for name, tensor, path in [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.mlp.up_proj.kernel"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", "transformer.h.mlp.c_fc.kernel"),
    ]:
        model, params = build(name)
        save_pretrained(tmp_path / name, model, params)
        stored = load_file(tmp_path / name / "model.safetensors")[tensor]
        kernel = np.asarray(paths.get(params, tuple(path.split(".")))[1])
        np.testing.assert_array_equal(stored, kernel.T if name == "llama" else kernel)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("span", [2**24, 1000])
def test_weights_are_cast_to_the_requested_dtype(folder, stored, asked, span, monkeypatch):
    for module in (hf_folder, hf_read):  # in full, or a few rows at a time
        monkeypatch.setattr(module, "CHUNK_BYTES", span)
    original = load_file(folder / "model.safetensors")
    edit(folder, lambda t: t.update({k: v.astype(stored) for k, v in t.items()}))
    model, params = load_pretrained(folder, dtype=asked)
    assert model.dtype == asked
    head = params["lm_head"]["kernel"]
    want = original["lm_head.weight"].T.astype(stored).astype(asked)
    np.testing.assert_array_equal(head, want)
    assert {leaf.dtype for _, leaf in paths.walk(params)} == {jnp.dtype(asked)}


def test_values_beyond_float16_are_refused(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": np.full(32, 1e6, np.float32)}))
    with pytest.raises(DataError, match=r"model.norm.weight: .*float16"):
        load_pretrained(folder, dtype="float16")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantizing_while_loading_equals_quantizing_after_loading(tmp_path, name):
    save_pretrained(tmp_path, *build(name))
    skip = {"llama": "o_proj", "gpt2": "c_fc"}[name]
    config = QuantConfig(llm_int8_skip_modules=(skip,))
    _, plain = load_pretrained(tmp_path, dtype="bfloat16")
    _, quantized = load_pretrained(tmp_path, dtype="bfloat16", quantization=config)
    want = quantize_params(plain, config)
    assert jax.tree.structure(quantized) == jax.tree.structure(want)
    same(quantized, want)
    assert sum(isinstance(leaf, nf4.NF4Array) for _, leaf in paths.walk(quantized)) > 2


def by_module(params):
    """Every module's leaf in one layer, dense, and whether it is quantized."""
    found = {}
    for leaf in paths.leaves(params):
        value = leaf.value.dequantize() if is_quantized(leaf.value) else leaf.value
        for i, module in enumerate(leaf.modules()):
            one = value[i] if leaf.stack else value
            found[module, leaf.kind] = np.asarray(one), is_quantized(leaf.value)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2_moe-mlp-first"])
def test_modules_may_be_left_unquantized_in_some_layers(tmp_path, name):
    """As in BitsAndBytesConfig. Layers that differ are stacked apart, and nothing else changes."""
    model, params = build(name)
    save_pretrained(tmp_path, model, params)
    last = model.config.num_hidden_layers - 1
    skip = (f"model.layers.{last}.mlp", "model.layers.0.self_attn.q_proj", "o_proj")
    config = QuantConfig(llm_int8_skip_modules=skip)
    loaded, got = load_pretrained(tmp_path, "float32", config)
    everything = by_module(load_pretrained(tmp_path, "float32", QuantConfig())[1])
    plain, got_by_module = by_module(params), by_module(got)
    assert got_by_module.keys() == plain.keys()
    left_out = set()
    for key, (value, quantized) in got_by_module.items():
        named = any(f".{key[0]}.".startswith(f".{n}.") or key[0].endswith(f".{n}") for n in skip)
        want = plain[key] if named else everything[key]
        assert quantized == want[1], key
        np.testing.assert_array_equal(value, want[0])
        left_out |= {key[0]} if named and everything[key][1] else set()
    assert {module.split(".")[2] for module in left_out} == {str(i) for i in range(last + 1)}
    dense = paths.map_leaves(lambda _, x: x.dequantize() if is_quantized(x) else x, got)
    ids = tokens(model, 2, 9)
    want = run(loaded, dense, ids)
    np.testing.assert_allclose(run(loaded, got, ids), want, atol=1e-5 * np.abs(want).max())
    if model.config.experts is None:  # transformers cannot load quantized experts
        save_pretrained(tmp_path / "packed", loaded, got, quantized=True)
        _, again = load_pretrained(tmp_path / "packed", "float32")
        assert jax.tree.structure(again) == jax.tree.structure(got)
    # Dense with the same stacks, as merging and LoftQ take it.
    _, unpacked = load_pretrained(tmp_path, "float32", stacked_for=config)
    assert dict(paths.walk(unpacked)).keys() == dict(paths.walk(got)).keys()
    assert not any(is_quantized(leaf) for _, leaf in paths.walk(unpacked))


@pytest.mark.parametrize("quantization", [None, QuantConfig()])
def test_progress_counts_the_bytes_of_all_tensors(sharded, quantization):
    calls = []
    load_pretrained(sharded, quantization=quantization, progress=lambda *call: calls.append(call))
    tensors = {k: v for file in sharded.glob("*.safetensors") for k, v in load_file(file).items()}
    sizes = sorted(value.nbytes for value in tensors.values())
    done = [0, *(call[0] for call in calls)]
    assert sorted(b - a for a, b in itertools.pairwise(done)) == sizes
    assert {call[1] for call in calls} == {sum(sizes)}


def test_loading_is_cancelled_between_two_tensors(sharded, monkeypatch):
    stop, read, original = threading.Event(), [], hf_folder.Shards.read

    def counted(self, name, *span):
        read.append(name)
        return original(self, name, *span)

    monkeypatch.setattr(hf_folder.Shards, "read", counted)
    with pytest.raises(hf_read.LoadingCancelledError):
        load_pretrained(sharded, progress=lambda *_: stop.set(), cancel=stop.is_set)
    assert len(read) == 1


@pytest.mark.parametrize("transposed", [True, False])
def test_a_part_of_several_tensors_is_joined(tmp_path, transposed):
    """Experts (2, E, in, out), each in two tensors that hold halves of its columns."""
    leaf = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
    place, stored = ("model", "layers", "experts", "kernel"), {}
    column_slices = {"up": slice(3, 6), "gate": slice(0, 3)}
    group = []
    for layer, half, expert in itertools.product(range(2), column_slices, range(3)):
        part = leaf[layer, expert][:, column_slices[half]]
        name = f"{layer}.{expert}.{half}"
        stored[name] = np.ascontiguousarray(part.T if transposed else part)
        within = (expert, slice(None), column_slices[half])
        group.append(CheckpointTensor(name, place, layer, transposed, stored[name].shape, within))
    save_file(stored, tmp_path / "model.safetensors")
    shape = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    source = TensorMap({name: name for name in stored}, {})
    parts = hf_read._parts(group)
    with hf_folder.open_shards(tmp_path) as shards:
        read = lambda index: hf_read._read(shards, source, parts[index], shape, None)  # noqa: E731
        joined = assemble_leaf(shape, None, parts, read, transposed)
    assert len(parts) == 6
    np.testing.assert_array_equal(joined, leaf.astype(jnp.bfloat16))


def test_quantized_parameters_are_written_dense(tmp_path):
    model, params = build("llama")
    quantized = quantize_params(params, QuantConfig())
    save_pretrained(tmp_path, model, quantized)
    _, read = load_pretrained(tmp_path, dtype="float32")
    same(read, paths.map_leaves(lambda _, x: getattr(x, "dequantize", lambda: x)(), quantized))


def test_tied_weights_are_read_under_either_name(tmp_path, monkeypatch):
    model, params = build("llama-rope")
    save_pretrained(tmp_path, model, params)
    table = "model.embed_tokens.weight"
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop(table)}))
    same(load_pretrained(tmp_path, dtype="float32")[1], params)
    edit(tmp_path, lambda t: t.update({table: t["lm_head.weight"]}))
    same(load_pretrained(tmp_path, dtype="float32")[1], params)
    monkeypatch.setattr(hf_folder, "CHUNK_BYTES", 3 * 32 * 8)  # three rows at a time

    def differ(t):
        t[table] = t["lm_head.weight"].copy()
        t[table][-1, -1] += 1

    edit(tmp_path, differ)
    with pytest.raises(DataError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_pretrained(tmp_path, dtype="float32")
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t[table][:60]}))
    with pytest.raises(
        DataError, match=r"lm_head.weight has shape \[60, 32\], expected \[61, 32\]"
    ):
        load_pretrained(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("name", "prefix", "buffer"),
    [
        ("llama-rope", "model.", "layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.", "h.0.attn.bias"),
    ],
)
def test_checkpoints_of_the_base_model_alone_are_read(tmp_path, name, prefix, buffer):
    model, params = build(name)
    save_pretrained(tmp_path, model, params)
    bare = {k.removeprefix(prefix): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file({**bare, buffer: np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    same(load_pretrained(tmp_path, dtype="float32")[1], params)


def test_all_faults_of_a_checkpoint_are_listed_at_once(folder):
    def spoil(t):
        del t["model.norm.weight"]
        for i in range(2):
            del t[f"model.layers.{i}.mlp.up_proj.weight"]
        t["model.layers.0.extra.weight"] = np.zeros(2, np.float32)
        t["lm_head.weight"] = t["lm_head.weight"][:60]
        t["model.layers.1.input_layernorm.weight"] = np.zeros(32, np.int32)
        t["layers.0.mlp.down_proj.weight"] = t["model.layers.0.mlp.down_proj.weight"]

    edit(folder, spoil)
    with pytest.raises(DataError) as caught:
        load_pretrained(folder)
    for line in (
        "model.norm.weight is missing",
        "model.layers.*.mlp.up_proj.weight is missing (2×)",
        "model.layers.0.extra.weight is not part of this model",
        "lm_head.weight has shape [60, 32], expected [61, 32]",
        "model.layers.1.input_layernorm.weight is of type I32, not a float",
    ):
        assert f"\n  {line}" in str(caught.value)
    twice = ["layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    assert any(f"{a} is also there as {b}" in str(caught.value) for a, b in (twice, twice[::-1]))


def test_faults_of_shards_and_of_the_index_are_in_the_same_listing(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    tensors = load_file(sharded / first)
    doubled = next(iter(tensors))
    misshapen = np.zeros((3, 5), np.float32)
    save_file(
        {**load_file(sharded / last), doubled: tensors[doubled], "more": misshapen}, sharded / last
    )
    file = index["weight_map"]["model.norm.weight"]
    save_file({**load_file(sharded / file), "model.norm.weight": misshapen}, sharded / file)
    index["weight_map"] |= {"ghost": first, "more": last}
    (sharded / INDEX).write_text(json.dumps(index))
    config = {**LLAMA, "num_hidden_layers": 3}
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError) as caught:
        load_pretrained(sharded)
    for line in (
        f"{doubled} is in {first} and {last}",
        f"ghost is in the index but not in {first}",
        "more is not part of this model",
        "model.norm.weight has shape [3, 5], expected [32]",
        "model.layers.2.mlp.up_proj.weight is missing",
    ):
        assert f"\n  {line}" in str(caught.value)


def test_nothing_is_read_before_the_headers_fit(folder, monkeypatch):
    edit(folder, lambda t: t.pop("model.norm.weight"))
    monkeypatch.setattr(hf_folder.Shards, "read", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(DataError):
        load_pretrained(folder)


def test_a_single_file_wins_over_an_index(sharded, tmp_path):
    """As in transformers; another program's save may have left both."""
    model, params = build("llama")
    other = jax.tree.map(lambda x: x + 1, params)
    save_pretrained(tmp_path / "other", model, other)
    shutil.copy(tmp_path / "other" / "model.safetensors", sharded)
    assert (sharded / INDEX).exists()
    same(load_pretrained(sharded, dtype="float32")[1], other)


def test_index_and_shards_must_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    tensors = load_file(sharded / first)
    doubled = next(iter(tensors))
    save_file({**load_file(sharded / second), doubled: tensors[doubled]}, sharded / second)
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["ghost"] = first
    moved = next(name for name, file in index["weight_map"].items() if file == second)
    index["weight_map"][moved] = first
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        load_pretrained(sharded)
    assert f"{doubled} is in {first} and {second}" in str(caught.value)
    assert "model.norm.weight is in" in str(caught.value)
    assert f"{moved} is in {second}, not in {first}" in str(caught.value)
    assert f"ghost is in the index but not in {first}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a\\b.safetensors", "w.bin"]
)
def test_shard_names_that_are_not_plain_are_refused(sharded, name):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    index["weight_map"]["lm_head.weight"] = "model-00000-of-00001.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        load_pretrained(sharded)
    assert f"\n  {name} is not the plain name of a safetensors file" in str(caught.value)
    assert "\n  model-00000-of-00001.safetensors is missing" in str(caught.value)


def test_links_out_of_the_folder_are_refused_but_for_the_hub_cache(folder, tmp_path):
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the folder"):
        load_pretrained(folder)

    for name in ("config.json", "generation_config.json", INDEX):
        if name == INDEX:  # beside a single file it is not read
            (folder / "model.safetensors").unlink()
        inside, backup = folder / name, folder / "kept"
        if inside.exists():
            inside.rename(backup)
        (tmp_path / "secret.json").write_text('{"model_type": "llama"}')
        inside.symlink_to(tmp_path / "secret.json")
        with pytest.raises(DataError, match=rf"{name}: is a link that leads out of the folder"):
            load_pretrained(folder)
        inside.unlink()
        if backup.exists():
            backup.rename(inside)

    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    outside.rename(repository / "blobs" / "0123")
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / "abc"
    folder.rename(snapshot)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    same(load_pretrained(snapshot, dtype="float32")[1], build("llama")[1])


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def test_pickles_are_refused_unread(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"pickles \(pytorch_model.bin\)[\s\S]*safe"):
        load_pretrained(folder)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_pretrained(folder)


def test_code_beside_the_weights_is_not_run(folder):
    (folder / "modeling_x.py").write_text("raise SystemExit('remote code ran')")
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    same(load_pretrained(folder, dtype="float32")[1], build("llama")[1])
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "x"}))
    with pytest.raises(ConfigError, match="never runs"):
        load_pretrained(folder)


@pytest.mark.parametrize("keep", [3, 200, 20000])
def test_truncated_files_are_damaged(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"model.safetensors: not a whole safetensors file"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "JSON object"),
        ("config.json", None, "missing"),
        ("model.safetensors", None, "there is no model.safetensors"),
        (INDEX, "{}", "no weight_map"),
        (INDEX, '{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
    ],
)
def test_malformed_folders_are_named(folder, file, text, message):
    if text is None:
        (folder / file).unlink()
    else:
        if file == INDEX:  # beside a single file it is not read
            (folder / "model.safetensors").unlink()
        (folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load_pretrained(folder)


def test_a_folder_that_is_not_there_is_a_config_error(tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(ConfigError, match="no such folder"):
            load_pretrained(name)


def test_an_unreachable_hub_is_reported(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StorageError, match="cannot be reached"):
        load_pretrained("someone/model")


def test_only_weights_and_tokenizer_are_downloaded(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    fake = lambda name, **options: asked.update(options, name=name) or str(folder)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    load_pretrained("someone/model", revision="v1")
    assert (asked["name"], asked["revision"]) == ("someone/model", "v1")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt"]
    junk = ["modeling.py", "pytorch_model.bin", "original/x.json", "consolidated.safetensors"]
    patterns = {k: asked[k] for k in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + junk, **patterns)) == wanted


def test_ids_that_end_a_reply_are_those_of_both_files(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    model, params = load_pretrained(folder, dtype="float32")
    assert model.config.eos_token_ids == (2, 9)
    save_pretrained(tmp_path / "again", model, params)
    assert load_pretrained(tmp_path / "again")[0].config.eos_token_ids == (2, 9)


def test_shards_have_the_requested_size_and_an_index(sharded):
    index = json.loads((sharded / INDEX).read_text())
    _, params = build("llama")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for file in sorted(sharded.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
            names = list(handle.keys())
            size = sum(handle.get_tensor(name).nbytes for name in names)
        assert size <= 16000 or len(names) == 1
        assert all(index["weight_map"][name] == file.name for name in names)


def test_shards_of_an_earlier_save_are_removed(sharded):
    (sharded / "tokenizer.json").write_text("{}")
    save_pretrained(sharded, *build("gpt2"))
    left = sorted(p.name for p in sharded.iterdir())
    assert left == ["config.json", "model.safetensors", "tokenizer.json"]


def test_what_a_killed_save_left_is_removed(tmp_path):
    left = tmp_path / ".partial-x" / ".partial-y"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("part")
    save_pretrained(tmp_path, *build("gpt2"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_parameters_of_another_model_are_refused(tmp_path):
    params = dict(build("llama")[1])
    params["extra"] = params.pop("lm_head")
    with pytest.raises(
        DataError, match=r"lm_head.kernel is missing[\s\S]*extra.kernel is not part"
    ):
        save_pretrained(tmp_path, build("llama")[0], params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["5 apples", 0, "-1GB"])
def test_invalid_shard_sizes_are_refused(tmp_path, size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        save_pretrained(tmp_path, *build("llama"), max_shard_size=size)


def test_a_failed_write_leaves_the_old_file_and_no_other(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(arrays, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jlora.io.hf.write.save_file", full)
    with pytest.raises(StorageError, match="disk is full"):
        save_pretrained(folder, *build("llama"))
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_models_compute(folder):
    model, params = load_pretrained(folder, dtype="float32")
    ids = tokens(model, 1, 8)
    np.testing.assert_array_equal(model(params, ids), build("llama")[0](build("llama")[1], ids))


@pytest.mark.parametrize("quantization", [None, QuantConfig()])
def test_parameters_are_placed_on_a_mesh(folder, quantization):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, placed = load_pretrained(folder, "float32", quantization=quantization, mesh=mesh)
    _, unsharded = load_pretrained(folder, "float32", quantization=quantization)
    same(placed, unsharded)
    want = jax.tree.leaves(sharding.shardings(unsharded, mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(placed)] == want
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    ids = tokens(model, 2, 8)
    np.testing.assert_allclose(model(placed, ids), model(unsharded, ids), atol=1e-5)


def test_sharded_parameters_are_written_in_full(folder, tmp_path):
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model, placed = load_pretrained(folder, "float32", mesh=mesh)
    save_pretrained(tmp_path / "again", model, placed)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    same(after, before)
