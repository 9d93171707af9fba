"""The classes of a classifier: from the settings, the model's own, or those in the rows."""

from __future__ import annotations

import dataclasses

from jlora.config import Config
from jlora.data import find_classes, load_rows
from jlora.data.rows import Labelled
from jlora.io.hf import read_model
from jlora.io.hf.folder import DESCRIPTION, find_folder
from jlora.models import as_classifier


def with_classes(config: Config) -> tuple[Config, str]:
    """The settings with ``model.num_labels`` and ``model.id2label`` filled in, and who says so.

    ``model.id2label`` comes first, then a classifier's own ``config.json``, then the training rows,
    which are read for it. Settings of a language model come back as they are.

    Raises:
      ConfigError: the sources have not ``model.num_labels`` classes.
      DataError: the rows' labels are no classes (see ``find_classes``).
    """
    if not config.classifies:
        return config, ""
    model = config.model
    names, origin = model.id2label, "the settings"
    if names is None:
        folder = find_folder(model.name_or_path, model.revision, DESCRIPTION)
        own = read_model(folder).config
        if own.num_labels is not None:
            own = as_classifier(own, model.num_labels or own.num_labels)
        names, origin = own.id2label, "the model"
    if not names:
        rows = (
            row
            for source in config.data.train
            for row in load_rows(source, config.data.on_bad_row).rows
            if isinstance(row, Labelled)
        )
        names, origin = find_classes(rows, model.num_labels), "the training rows"
    filled = dataclasses.replace(model, id2label=tuple(names), num_labels=len(names))
    return dataclasses.replace(config, model=filled), origin
