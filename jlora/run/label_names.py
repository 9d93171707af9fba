"""The label names of a classifier: from the settings, the model or the training rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jlora.config import Config
from jlora.data import infer_label_names, load_rows
from jlora.data.rows import LabelledText
from jlora.errors import ConfigError
from jlora.io.hf import read_model
from jlora.io.hf.folder import CONFIG_FILES, find_folder
from jlora.io.peft import CONFIG_FILE
from jlora.models import as_classifier


def with_label_names(config: Config) -> tuple[Config, str]:
    """The settings with ``model.num_labels`` and ``model.id2label`` filled in, and their origin.

    ``model.id2label`` has precedence, then a classifier's own ``config.json``, then the labels of
    the training rows, which are read for it. Settings of a language model are returned unchanged.

    Raises:
      ConfigError: the number of classes found is not ``model.num_labels``.
      DataError: the rows' labels are not classes (see ``infer_label_names``).
    """
    if not config.is_classification:
        return config, ""
    model = config.model
    names, origin = model.id2label, "the settings"
    if names is None:
        folder = find_folder(model.name_or_path, model.revision, CONFIG_FILES)
        found = read_model(folder).config
        if found.num_labels is not None:
            found = as_classifier(found, model.num_labels or found.num_labels)
        names, origin = found.id2label, "the model"
    # The settings of an adapter's folder name that folder in place of training rows.
    named, folder = Path(config.data.train[0].path), Path(config.train.output_dir)
    is_adapter = named.resolve() == folder.resolve() and (folder / CONFIG_FILE).is_file()
    if not names and is_adapter:
        raise ConfigError(
            "an adapter's folder does not name the classes",
            where="model.id2label",
            fix="add them in the order of their ids: 'model.id2label=[negative, positive]'",
        )
    if not names:
        rows = (
            row
            for source in config.data.train
            for row in load_rows(source, config.data.on_bad_row).rows
            if isinstance(row, LabelledText)
        )
        names, origin = infer_label_names(rows, model.num_labels), "the training rows"
    filled = dataclasses.replace(model, id2label=tuple(names), num_labels=len(names))
    return dataclasses.replace(config, model=filled), origin
