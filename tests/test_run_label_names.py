"""Where class names come from: the settings, the model, or the rows."""

import dataclasses
import json

import pytest
from tiny_models import LLAMA
from tiny_runs import write_rows

from jlora import config
from jlora.errors import ConfigError
from jlora.run.label_names import with_label_names


@pytest.fixture
def settings(tmp_path):
    """Settings for a folder with only a config.json, and rows with the classes ``a`` and ``b``."""
    rows = [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    source = config.SourceConfig(path=str(path), format="classification")

    def make(hf, **model):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **hf}))
        return config.Config(
            model=config.ModelConfig(name_or_path=str(tmp_path), **model),
            data=config.DataConfig(train=[source]),
            train=config.TrainConfig(output_dir="out"),
        )

    return make


CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
OWN = {**CLASSIFIER, "id2label": {"1": "y", "0": "x", "2": "z"}}


@pytest.mark.parametrize(
    ("hf", "model", "names", "origin"),
    [
        ({}, {}, ("a", "b"), "the training rows"),
        ({"id2label": OWN["id2label"]}, {}, ("a", "b"), "the training rows"),  # not a classifier's
        ({}, {"id2label": ["b", "a"]}, ("b", "a"), "the settings"),
        (OWN, {}, ("x", "y", "z"), "the model"),
        (OWN, {"num_labels": 3}, ("x", "y", "z"), "the model"),
        (CLASSIFIER, {}, ("LABEL_0", "LABEL_1"), "the model"),
        (OWN, {"id2label": ["p", "q", "r"]}, ("p", "q", "r"), "the settings"),
    ],
)
def test_the_origin_of_the_class_names(settings, hf, model, names, origin):
    found, source = with_label_names(settings(hf, **model))
    assert (found.model.id2label, found.model.num_labels, source) == (names, len(names), origin)
    assert with_label_names(found)[0] == found


def test_another_number_of_classes_than_the_models_is_refused(settings):
    with pytest.raises(ConfigError, match="is 2, but the model has 3 classes: x, y, z") as caught:
        with_label_names(settings(OWN, num_labels=2))
    assert caught.value.where == "model.num_labels"


def test_a_language_models_settings_stay_as_they_are(settings):
    given = settings({})
    texts = dataclasses.replace(given.data.train[0], format="text")
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, train=(texts,)))
    assert with_label_names(given) == (given, "")
