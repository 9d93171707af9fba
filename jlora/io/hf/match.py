"""Which tensor of a folder's files is which tensor of the model; every mismatch in one error.

Reads the headers of safetensors files and, of prequantized folders, the layout of quantized
matrices; no weights, except to compare a stored head with the embedding that it is tied to.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from jlora.errors import DataError
from jlora.io.hf import prequantized
from jlora.io.hf.folder import FLOATS, Shards
from jlora.io.hf.names import (
    CheckpointTensor,
    checkpoint_tensors,
    embedding_name,
    head_name,
    is_of_others,
    tensors_by_layer,
)
from jlora.io.hf.prequantized import Problems, StoredMatrix
from jlora.models.model import Model
from jlora.models.registry import family_of
from jlora.models.resizing import as_in_files
from jlora.tree import paths


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """Where the tensors of a model are in its files."""

    names: Mapping[str, str]
    """Name of a tensor of the model → its name in the files."""
    prequantized: Mapping[str, StoredMatrix]
    """The layout of each tensor that is quantized in the files."""


def match_tensors(shards: Shards, model: Model, folder: Path) -> TensorMap:
    """Maps the tensors of the model to those of the files; DataError if they do not fit.

    Names differ in checkpoints without the head's prefix and in tied models that store the head.
    A resized vocabulary is matched as it is in the files.
    If ``config.json`` has a ``quantization_config``, the prequantization layout (which tensors are
    quantized, and how) is read from the safetensors headers.
    """
    model = as_in_files(model)
    expected = {t.name: t for t in checkpoint_tensors(model)}
    parts = (
        prequantized.find_quantization_tensors(shards.files) if model.config.prequantized else {}
    )
    names, problems = _find(shards, model, expected, parts)
    layouts, prequantized_folder = {}, model.config.prequantized
    for name, tensor in expected.items():
        weight_parts = parts.get(names.get(name, ""), {})
        if name not in names:
            problems.append((name, "is missing"))
        elif prequantized_folder and prequantized.is_prequantized(
            shards, names[name], weight_parts, tensor
        ):
            layouts[name], faults = prequantized.read_layout(
                shards, names[name], weight_parts, tensor
            )
            problems += faults
            parts.pop(names[name], None)
        elif shards.shape(names[name]) != tensor.shape:
            shape = list(shards.shape(names[name]))
            problems.append((name, f"has shape {shape}, expected {list(tensor.shape)}"))
        elif shards.dtype(names[name]) not in FLOATS:
            problems.append((name, f"is of type {shards.dtype(names[name])}, not a float"))
    orphans = [name for group in parts.values() for name in group.values()]
    unknown = [name for name in orphans if not is_of_others(name, model)]
    problems += [(name, "is not part of this model") for name in unknown]
    if prequantized_folder and not layouts:
        problems.append(("quantization_config", "is in config.json, but no tensor is quantized"))
    # A layout that could not be read is a problem already, and has nothing to be compared.
    if None not in layouts.values():
        problems += prequantized.mixed_layouts(tensors_by_leaf(model).values(), layouts)
    problems += _check_tied_head(shards, model, names, bool(problems))
    if problems:
        raise DataError(
            f"the weights do not fit config.json:\n{_listing(problems)}",
            where=str(folder),
            fix="use the config.json and the weights of one model",
        )
    return TensorMap(names, layouts)


def _find(
    shards: Shards, model: Model, expected: Iterable[str], parts: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, str], Problems]:
    """{tensor of the model: its name in the files}, and unexpected or duplicate tensors.

    The head of a tied model is among them if it is stored.
    """
    names, problems = {}, list(shards.problems)
    conventions, table, head = family_of(model.config), embedding_name(model), head_name(model)
    wanted, tied_files = {*expected}, _is_tied_in_files(model)
    base = conventions.rename(("model",))[0]
    known = {name for group in parts.values() for name in group.values()}
    if tied_files:
        wanted.add(head)
    for name in shards.files:
        # Files of the base model alone lack a prefix; others have the modules' names, or both.
        modules = map(conventions.name_in_files, (name, f"{base}.{name}"))
        forms = (name, f"{table.split('.')[0]}.{name}", *modules)
        full = next((form for form in forms if form in wanted), name)
        ignored = name in known or is_of_others(name, model)
        if full in names:
            problems.append((name, f"is also there as {names[full]}"))
        elif full in wanted:
            names[full] = name
        elif not ignored and not re.fullmatch(conventions.buffers, name):
            problems.append((name, "is not part of this model"))
    if tied_files and head in names:
        names.setdefault(table, names[head])
    if model.config.untied and table in names:
        names.setdefault(head, names[table])
    return names, problems


def _is_tied_in_files(model: Model) -> bool:
    """Whether the files may have the embedding's tensor under either name, or both."""
    return model.config.tie_word_embeddings or model.config.untied


def _check_tied_head(
    shards: Shards, model: Model, names: Mapping[str, str], has_problems: bool
) -> Problems:
    """Problems of a stored head that is tied to the embedding.

    Their values are compared only if there is no other problem.
    """
    head, table = names.get(head_name(model)), names.get(embedding_name(model))
    if not _is_tied_in_files(model) or head is None or table is None or head == table:
        return []
    if (shape := shards.shape(head)) != shards.shape(table):
        expected = list(shards.shape(table))
        return [(head, f"has shape {list(shape)}, expected {expected}")]
    if has_problems or shards.same(table, head):
        return []
    # transformers would ignore the stored head: whoever trained it would lose it without a word.
    return [(head, f"differs from {table}, but tie_word_embeddings says that they are the same")]


def unquantized_matrices(shards: Shards, model: Model) -> tuple[frozenset[str], ...]:
    """Per layer: the matrices that are not quantized in the files; () if they are in all layers."""
    # By the headers, not by `llm_int8_skip_modules`, whose entries are regular expressions of an
    # untrusted file.
    parts = prequantized.find_quantization_tensors(shards.files)
    names, _ = _find(shards, model, {t.name for t in checkpoint_tensors(model)}, parts)

    def is_dense(tensor: CheckpointTensor) -> bool:
        name = names.get(tensor.name)
        return name is not None and not prequantized.is_prequantized(
            shards, name, parts.get(name, {}), tensor
        )

    dense = tuple(
        frozenset(".".join(path) for path, tensors in layer.items() if any(map(is_dense, tensors)))
        for layer in tensors_by_layer(model)
    )
    return dense if len(set(dense)) > 1 else ()


def _listing(problems: Iterable[tuple[str, str]]) -> str:
    """One line per problem; the same problem in several layers is one line with their number."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, cause in problems:
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), cause), []).append(name)
    lines = []
    for (pattern, cause), names in groups.items():
        if len(names) > 1:
            lines.append(f"  {pattern} {cause} ({len(names)}×)")
        else:
            lines.append(f"  {names[0]} {cause}")
    return "\n".join(lines)


def tensors_by_leaf(model: Model) -> dict[paths.Path, list[CheckpointTensor]]:
    """The tensors of each leaf, in the order of its layers."""
    groups: dict[paths.Path, list[CheckpointTensor]] = {}
    for tensor in checkpoint_tensors(model):
        groups.setdefault(tensor.path, []).append(tensor)
    return groups
