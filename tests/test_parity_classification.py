"""Classifiers compared with transformers' ForSequenceClassification models and peft's adapters."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_models
from tiny_peers import PEERS_TALK, peft, torch, transformers
from tiny_runs import write_rows
from transformers.models.auto import modeling_auto

import jlora
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.io.peft import to_peft_tensors
from jlora.models import as_classifier
from jlora.models.registry import FAMILIES
from jlora.tree import paths

pytestmark = PEERS_TALK

LABELS, PAD = ("no", "perhaps", "yes"), 60
MODELS = ["llama", "gpt2", "phi"]
FAMILY = pytest.mark.parametrize("name", MODELS)
MORE_FAMILIES = pytest.mark.parametrize("name", [*MODELS, "gemma2", "gemma3", "opt-350m"])
TARGETS = {"gpt2": ["c_attn", "c_fc"], "phi": ["q_proj", "fc2"]}


def classifier(name):
    """A tiny classifier whose random score head gives widely spread logits."""
    model, params = tiny_models.build(name)
    config = as_classifier(model.config, len(LABELS), LABELS, PAD)
    params = {key: node for key, node in params.items() if key != "lm_head"}
    score = np.random.default_rng(5).standard_normal((config.feature_size, len(LABELS)))
    params["score"] = {"kernel": jax.numpy.asarray(score, jax.numpy.float32)}
    return dataclasses.replace(model, config=config), params


def load_torch(folder, **options):
    """transformers' classifier loaded from a folder, and the kinds of problems that it reported."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    return model.eval(), {k for k, v in info.items() if v}


def texts(model, rng_seed=0):
    """Two texts of token ids, of 24 and of 15 tokens."""
    ids = np.random.default_rng(rng_seed).integers(3, PAD, (2, tiny_models.LENGTH))
    return [ids[0], ids[1, :15]]


def jlora_logits(model, params, rows):
    """Logits at the last token of each text, (rows, classes)."""
    ids = np.zeros((2, tiny_models.LENGTH), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    logits = tiny_models.run(model, params, ids)
    return np.stack([logits[i, len(row) - 1] for i, row in enumerate(rows)])


def torch_logits(model, rows, side="right"):
    """The same logits of a torch model, computed in one padded batch."""
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    ids, mask, positions = map(torch.tensor, (ids, mask, positions))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()


def assert_close(got, want, bound=1e-5):
    assert np.abs(want).max() > 1 and np.ptp(want, -1).min() > 0.1
    np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name → (model, params, the folder that jlora wrote); each is made once."""
    cache = {}

    def get(name):
        if name not in cache:
            folder = tmp_path_factory.mktemp(name)
            model, params = classifier(name)
            save_pretrained(folder, model, params)
            cache[name] = model, params, folder
        return cache[name]

    return get


def test_classifier_class_names_match_transformers():
    """transformers has no classifier for Granite, Cohere and for most multimodal models."""
    expected = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    actual = {kind: family.classifier for kind, family in FAMILIES.items()}
    assert {kind for kind in actual if kind not in expected} == {
        "granite",
        "cohere",
        "cohere2",
        "mistral3",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
    }
    for kind in actual.keys() & expected.keys():
        assert actual[kind] == expected[kind]


@MORE_FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_at_the_last_token_match_transformers(pair, name, side):
    model, params, folder = pair(name)
    torch_model, faults = load_torch(folder)
    assert not faults
    assert torch_model.config.id2label == dict(enumerate(LABELS))
    assert torch_model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert_close(
        jlora_logits(model, params, texts(model)), torch_logits(torch_model, texts(model), side)
    )


@FAMILY
def test_folders_written_by_transformers_are_read(pair, name, tmp_path):
    _, params, folder = pair(name)
    load_torch(folder)[0].save_pretrained(tmp_path)
    loaded, loaded_params = load_pretrained(tmp_path, dtype="float32")
    assert (loaded.config.num_labels, loaded.config.id2label) == (3, LABELS)
    assert dict(paths.walk(loaded_params)).keys() == dict(paths.walk(params)).keys()
    for path, leaf in paths.walk(loaded_params):
        np.testing.assert_array_equal(leaf, paths.get(params, path))


@FAMILY
def test_adapters_are_exchanged_with_peft_in_both_directions(pair, name, tmp_path):
    """The base is a causal model without a score head: only the adapter file contains one."""
    causal, params = tiny_models.build(name)
    save_pretrained(tmp_path / "base", causal, params)
    model, params = load_pretrained(tmp_path / "base", dtype="float32", num_labels=3)
    base, faults = load_torch(tmp_path / "base", num_labels=3, pad_token_id=PAD)
    assert faults >= {"missing_keys"}, "transformers initializes the score head randomly"
    targets = TARGETS.get(name, ["q_proj", "down_proj"])
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": "SEQ_CLS"}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_B" in key or "score" in key:
                value.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "peft")
    want = torch_logits(adapted, texts(model))

    adapter = jlora.load_adapter(tmp_path / "peft", params)
    assert_close(jlora_logits(model, jlora.attach(params, adapter), texts(model)), want)
    assert_close(jlora_logits(model, jlora.merge(params, adapter), texts(model)), want)

    jlora.save_adapter(tmp_path / "jlora", adapter)
    files = [
        json.loads((tmp_path / s / "adapter_config.json").read_text()) for s in ("peft", "jlora")
    ]
    skipped = ("peft_version", "base_model_name_or_path", "target_modules", "revision")
    expected, actual = ({k: v for k, v in f.items() if k not in skipped} for f in files)
    assert actual == expected and actual["modules_to_save"] == ["classifier", "score"]
    contents = [
        (tmp_path / s / "adapter_model.safetensors").read_bytes() for s in ("peft", "jlora")
    ]
    assert contents[0] == contents[1]
    fresh, _ = load_torch(tmp_path / "base", num_labels=3, pad_token_id=PAD)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "jlora").eval()
    np.testing.assert_allclose(torch_logits(loaded, texts(model)), want, atol=1e-6)


def test_a_new_adapter_has_pefts_names_and_shapes(pair, tmp_path):
    causal, params = tiny_models.build("llama")
    save_pretrained(tmp_path, causal, params)
    _, params = load_pretrained(tmp_path, dtype="float32", num_labels=3)
    config = jlora.LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["norm"])
    adapter = jlora.init_adapter(jax.random.key(0), params, config)
    base, _ = load_torch(tmp_path, num_labels=3)
    settings = peft.LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["norm"])
    adapted = peft.get_peft_model(base, settings)
    want = peft.get_peft_model_state_dict(adapted)
    got = to_peft_tensors(adapter)
    assert {k: v.shape for k, v in got.items()} == {k: tuple(v.shape) for k, v in want.items()}
    assert adapter.config.modules_to_save == tuple(adapted.peft_config["default"].modules_to_save)


STEPS, ROWS = 3, 4
TEXTS = ("the sun is up", "no", "a bird sings in the tree", "what is 2 + 2?", "fine, thank you")


def torch_losses(model, tokenizer, rows):
    """transformers' mean loss over the rows of each step, while AdamW trains the model."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        part = rows[ROWS * step : ROWS * (step + 1)]
        batch = tokenizer([r["text"] for r in part], padding=True, return_tensors="pt")
        labels = torch.tensor([LABELS.index(r["label"]) for r in part])
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_three_losses_and_the_trained_adapter_match_peft(place):
    rows = [
        {"text": f"{i} {TEXTS[i % 5]}", "label": LABELS[i % 3]} for i in range(ROWS * STEPS)
    ]  # texts of different lengths
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.base)
    tokenizer.pad_token = tokenizer.eos_token
    options = {"num_labels": 3, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    base, _ = load_torch(place.base, **options)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    model.save_pretrained(place.folder / "init")
    want = torch_losses(model.eval(), tokenizer, rows)
    place.run(
        lora={**settings, "lora_dropout": 0.0, "init_from": str(place.folder / "init")},
        data={
            "train": [
                {
                    "path": str(write_rows(place.folder / "rows.jsonl", rows)),
                    "format": "classification",
                }
            ],
            "eval": [],
            "packing": False,
            "shuffle": False,
        },
        train={
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "eval_steps": None,
            "save_steps": None,
        },
    )
    assert np.ptp(want) > 0.1, "the loss must vary between steps"
    np.testing.assert_allclose(place.losses(), want, rtol=1e-4)

    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    fresh, _ = load_torch(place.base, **options)
    loaded = peft.PeftModel.from_pretrained(fresh, place.output).eval()
    with torch.no_grad():
        got, expected = loaded(**batch).logits.numpy(), model(**batch).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
