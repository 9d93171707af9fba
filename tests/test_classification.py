"""A classifier from rows to metrics: the commands, and the folders that they write."""

import importlib
import json

import jax
import numpy as np
import pytest
import tiny_results
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA
from tiny_runs import TARGETS, Place, write_rows

import jlora
from jlora import evaluate, generate
from jlora.data.tokenizer import load_tokenizer
from jlora.errors import ConfigError, DataError
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.models import Model
from jlora.tree import paths

LIKED, DISLIKED = ("fine", "good", "nice", "lovely"), ("bad", "awful", "poor", "sad")
THINGS = ("sun", "moon", "tree", "bird", "boat", "lake", "road", "song", "hat", "wall")
NAMES = ("disliked", "liked")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS"}


def rows(things):
    """Texts in which one word determines the class."""
    words = [(w, "liked") for w in LIKED] + [(w, "disliked") for w in DISLIKED]
    return [{"text": f"the {t} is {w} {t}", "label": label} for t in things for w, label in words]


def sections(folder, **train):
    sources = {"train": rows(THINGS[:8]), "eval": rows(THINGS[8:])}
    for name, found in sources.items():
        path = write_rows(folder / f"{name}-classes.jsonl", found)
        sources[name] = [{"path": str(path), "format": "classification"}]
    steps = {"max_steps": 24, "eval_steps": None, "save_steps": None, "bf16": False}
    steps["lr_scheduler_type"] = "cosine"
    return {"lora": LORA, "data": sources, "train": steps | train}


@pytest.fixture(scope="module")
def here(tiny_base, tiny_cache, tmp_path_factory):
    """A run that has learned to classify the held-out rows."""
    place = Place(tmp_path_factory.mktemp("classes"), tiny_base, tiny_cache)
    place.given = sections(place.folder)
    place.run(**place.given)
    return place


def logits(model, params, texts, place):
    """Logits at each text's last token, one text at a time, without padding or packing."""
    tokenizer = load_tokenizer(str(place.base))
    found = []
    for text in texts:
        row = np.zeros((1, 32), np.int32)
        ids = tokenizer(text)["input_ids"]
        row[0, : len(ids)] = ids
        found.append(np.asarray(model(params, row), np.float64)[0, len(ids) - 1])
    return np.stack(found)


@pytest.fixture(scope="module")
def scores(here):
    """Logits of the held-out rows, from the public functions, and their labels."""
    model, params = load_pretrained(str(here.base), dtype="float32", num_labels=2)
    adapted = jlora.attach(params, jlora.load_adapter(here.output, params))
    held_out = rows(THINGS[8:])
    found = logits(model, adapted, [row["text"] for row in held_out], here)
    return found, np.array([NAMES.index(row["label"]) for row in held_out])


def figures(scores):
    found, labels = scores
    losses = np.log(np.exp(found).sum(-1)) - found[np.arange(len(labels)), labels]
    predicted = found.argmax(-1)
    right = ((predicted == 1) & (labels == 1)).sum()
    f1 = 2 * right / ((predicted == 1).sum() + (labels == 1).sum())
    return {
        "eval_loss": losses.mean(),
        "eval_accuracy": (predicted == labels).mean(),
        "eval_f1": f1,
    }


def test_held_out_rows_are_classified_and_reported(here, scores):
    last = here.log()[-1]
    want = figures(scores)
    assert want["eval_accuracy"] > 0.9, "half of them would be right by chance"
    assert {k: v for k, v in last.items() if k != "step"} == pytest.approx(want, rel=1e-4)
    assert "accuracy" in (here.output / "report.html").read_text()


def test_evaluate_needs_only_the_run_folder(here, scores, capsys):
    """The classes are in its config.yaml; the training rows may be missing."""
    given = {**here.given["data"], "train": [{"path": "org/gone", "format": "classification"}]}
    names = {"id2label": list(NAMES)}
    tiny_results.run(here, evaluate, **here.given | {"data": given, "model": names})
    found = json.loads((here.output / "evaluation.json").read_text())
    assert found.pop("eval_samples") == 16 and found.pop("replies") == []
    assert found == pytest.approx(figures(scores), rel=1e-4)
    assert "eval_accuracy" in capsys.readouterr().out
    written = jlora.config.load(here.output)
    assert written.model.id2label == NAMES and written.model.num_labels == 2


@pytest.fixture(scope="module")
def merged(here):
    """The folder of the merged model."""
    tiny_results.run(here, importlib.import_module("jlora.merge"), **here.given)
    return here.output / "merged"


def test_a_merged_model_is_a_classifier_by_itself(here, merged, scores):
    model, params = load_pretrained(merged, dtype="float32")
    assert model.config.id2label == NAMES
    held_out = [row["text"] for row in rows(THINGS[8:])]
    np.testing.assert_allclose(logits(model, params, held_out, here), scores[0], atol=1e-5)
    hf = json.loads((merged / "config.json").read_text())
    assert hf["architectures"] == ["LlamaForSequenceClassification"]
    tokenizer = load_tokenizer(str(merged))
    assert hf["pad_token_id"] == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_full_fine_tuning_starts_from_a_classifiers_own_head(here, merged, place, scores):
    """One step with a tiny learning rate leaves the merged model's metrics unchanged."""
    given = here.given | {"lora": None, "model": {"name_or_path": str(merged)}}
    given["train"] = given["train"] | {"max_steps": 1, "learning_rate": 1e-9}
    place.run(**given)
    last = place.log()[-1]
    assert {k: v for k, v in last.items() if k != "step"} == pytest.approx(
        figures(scores), rel=1e-4
    )
    model, params = load_pretrained(place.output, dtype="float32")
    assert model.config.id2label == NAMES and "score" in params and "lm_head" not in params


def test_what_a_classifier_cannot_do_is_refused(here, merged, place, result):
    with pytest.raises(ConfigError, match="is a classifier, which writes no replies"):
        tiny_results.run(here, generate, **here.given | {"generate": {"prompt": "x"}})
    lora = LORA | {"target_modules": TARGETS, "init_from": str(result.output)}
    causal = here.given | {"lora": lora}
    with pytest.raises(ConfigError, match=r"no score head \(task_type: CAUSAL_LM\)") as caught:
        place.run(**causal)
    assert caught.value.where == str(result.output)
    with pytest.raises(ConfigError, match="is a classifier, but the rows have no classes"):
        place.run(model={"name_or_path": str(merged)})


@pytest.fixture
def folder(tmp_path):
    """A classifier's folder."""
    model = Model.from_config(LLAMA | {"architectures": ["LlamaForSequenceClassification"]})
    save_pretrained(tmp_path, model, numbers(model))
    return tmp_path


def numbers(model):
    """Parameters with arbitrary values."""
    rng = np.random.default_rng(0)
    return paths.map_leaves(
        lambda _, leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), model.shapes
    )


def change(folder, tensors=None, **keys):
    """Changes the folder's tensors (None removes one) and the keys of its config.json."""
    file, json_file = folder / "model.safetensors", folder / "config.json"
    old = load_file(file) | (tensors or {})
    save_file({k: v for k, v in old.items() if v is not None}, file, metadata={"format": "pt"})
    json_file.write_text(json.dumps(json.loads(json_file.read_text()) | keys))


def test_a_fresh_score_head_is_initialised_as_in_transformers(tmp_path):
    model = Model.from_config(LLAMA | {"initializer_range": 0.1}, "float32")
    params = numbers(model)
    save_pretrained(tmp_path, model, params)
    heads = []
    for seed in (0, 0, 1):
        read, back = load_pretrained(tmp_path, dtype="float32", num_labels=200, seed=seed)
        heads.append(np.asarray(back.pop("score")["kernel"]))
        assert read.config.num_labels == 200 and read.config.id2label[199] == "LABEL_199"
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 0.1
    np.testing.assert_allclose(heads[0].std(), model.config.initializer_range, rtol=0.03)
    assert abs(heads[0].mean()) < 0.01
    left = {path for path, _ in paths.walk(params)} - {path for path, _ in paths.walk(back)}
    assert left == {("lm_head", "kernel")}
    for path, leaf in paths.walk(back):
        np.testing.assert_array_equal(leaf, paths.get(params, path))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"score.weight": None}, "score.weight is missing"),
        ({"score.bias": np.zeros(2, np.float32)}, "score.bias is not part"),
        (
            {"score.weight": np.zeros((3, 32), np.float32)},
            "score.weight has shape [3, 32], expected [2, 32]",
        ),
    ],
)
def test_a_classifiers_tensors_are_checked(folder, tensors, words):
    change(folder, tensors)
    with pytest.raises(DataError) as caught:
        load_pretrained(folder, num_labels=2)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        ({"problem_type": "multi_label_classification"}, {}, "problem_type"),
        ({"id2label": {"0": "a"}}, {}, "one label is regression"),
        ({}, {"num_labels": 3}, "model.num_labels: is 3, but the model has 2 classes"),
    ],
)
def test_other_tasks_and_other_numbers_of_classes_are_refused(folder, keys, options, words):
    change(folder, **keys)
    with pytest.raises(ConfigError) as caught:
        load_pretrained(folder, **options)
    assert words in str(caught.value)


def test_an_adapter_with_a_score_head_needs_a_classifier():
    params = Model.from_config(LLAMA).shapes
    config = jlora.LoraConfig(task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="needs a model with a score head"):
        jlora.init_adapter(jax.random.key(0), params, config)
