"""Packed rows, compared with the examples that were packed."""

import time

import numpy as np
import pytest

from jlora.data.examples import IGNORE, Examples
from jlora.data.packing import best_fit, next_fit, pack, positions, segment_dtype
from jlora.ops.attention.case import UNKNOWN_DOCUMENTS, most_documents


def make(lengths, seed=0):
    """Examples whose tokens are all different, so that each can be identified."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(1, starts[-1] + 1, dtype=np.int32)
    learned = np.random.default_rng(seed).random(len(ids)) < 0.5
    return Examples(ids, np.where(learned, ids + 1, IGNORE).astype(np.int32), starts)


def unpack(packed):
    """The (id, label) pairs of every document, collected token by token; checks positions."""
    found = []
    places = positions(packed.segment_ids)
    for row in range(len(packed)):
        documents, last = {}, 0
        for t, segment in enumerate(packed.segment_ids[row].tolist()):
            if segment == 0:
                assert (packed.input_ids[row, t], packed.labels[row, t]) == (0, IGNORE)
                continue
            assert segment in (last, last + 1)
            last = segment
            token = (packed.input_ids[row, t], packed.labels[row, t])
            documents.setdefault(segment, []).append(token)
            assert places[row, t] == len(documents[segment]) - 1
        found += documents.values()
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("lengths", [[5], [8, 1, 8, 7, 1], [3] * 10, [1, 2, 3, 4, 5, 6, 7, 8] * 9])
def test_every_example_is_in_exactly_one_row(packing, shuffle, lengths):
    examples = make(lengths)
    packed = pack(examples, 8, packing=packing, shuffle=shuffle)
    expected = [list(zip(*examples[i], strict=True)) for i in range(len(examples))]
    found = unpack(packed)
    assert sorted(found) == sorted(expected)
    if not (packing and shuffle):
        assert found == expected  # in the order of the file
    if not packing:
        assert len(packed) == len(lengths)


def naive_best_fit(lengths, length):
    """How full each row is by the textbook algorithm, which searches all rows for each example."""
    left = []
    for need in sorted(lengths, reverse=True):
        fitting = [space for space in left if space >= need]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else length) - need)
    return sorted(length - space for space in left)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_textbook_algorithm(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, 200)
    rows = best_fit(lengths, 32)
    assert sorted(np.bincount(rows, lengths)) == naive_best_fit(lengths, 32)


def test_next_fit_opens_a_row_only_when_the_last_is_full():
    assert next_fit(np.array([3, 5, 1, 8, 2]), 8).tolist() == [0, 0, 1, 2, 3]


def test_examples_longer_than_a_row_are_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit into 8"):
        pack(make([2, 9]), 8)


def test_no_examples_give_no_rows():
    assert pack(make([]), 8).input_ids.shape == (0, 8)


def test_a_hundred_thousand_rows_take_seconds():
    lengths = np.random.default_rng(0).integers(1, 100, 100_000)
    start = time.perf_counter()
    packed = pack(make(lengths), 256)
    assert time.perf_counter() - start < 20
    assert (packed.segment_ids > 0).sum() == lengths.sum()
    assert (packed.segment_ids > 0).mean() > 0.99


def test_positions_restart():
    segments = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 0, 0, 0]], np.int32)
    wanted = [[0, 1, 0, 1, 2, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    np.testing.assert_array_equal(positions(segments), wanted)
    np.testing.assert_array_equal(positions(segments[None])[0], wanted)


@pytest.mark.parametrize(("documents", "most"), [(0, 1), (1, 1), (2, 255), (255, 255)])
def test_attention_learns_the_most_documents_from_the_type(documents, most):
    ids = np.asarray([[documents, 0]], segment_dtype(documents))
    assert ids[0, 0] == documents, "the type holds the number"
    assert most_documents(ids) == most


def test_more_documents_than_a_byte_holds_are_any_number():
    ids = np.asarray([256], segment_dtype(256))
    assert ids[0] == 256 and most_documents(ids) == UNKNOWN_DOCUMENTS
