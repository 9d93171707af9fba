"""Order as a function of seed and step."""

from collections import Counter

import numpy as np
import pytest

from jlora.data.order import PADDING_ROW, Order, epoch_rows


def epoch(order, number):
    """The rows of an epoch, collected step by step, without padding, which is at its end."""
    first, after = (int(n * order.mean_steps_per_epoch(n)) for n in (number, number + 1))
    steps = [order.rows_at(step) for step in range(first, after)]
    assert all(len(s) == order.batch and s[0] != PADDING_ROW for s in steps)
    rows = np.concatenate([*steps, np.zeros(0, int)])
    real = (rows != PADDING_ROW).sum()
    assert (rows[:real] != PADDING_ROW).all() and len(rows) - real < order.batch
    return rows[:real].tolist()


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
def test_an_epoch_has_each_row_once(rows):
    order = Order(((rows, 1.0),), batch=8, seed=3)
    for number in range(3):
        assert sorted(epoch(order, number)) == list(range(rows))


def test_epochs_and_seeds_differ():
    order = Order(((100, 1.0),), batch=10, seed=3)
    seen = [tuple(epoch(order, e)) for e in range(4)]
    seen.append(tuple(epoch(Order(((100, 1.0),), batch=10, seed=4), 0)))
    assert len(set(seen)) == 5 and tuple(range(100)) not in seen


def test_the_batch_size_does_not_change_the_order():
    small, large = (Order(((50, 1.0), (7, 2.0)), b, seed=1) for b in (3, 16))
    assert epoch(small, 2) == epoch(large, 2)


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees():
    order = Order(((30, 1.0), (11, 0.5)), batch=4, seed=9)
    uninterrupted = [order.rows_at(s).tolist() for s in range(40)]
    epoch_rows.cache_clear()
    resumed = Order(((30, 1.0), (11, 0.5)), batch=4, seed=9)
    assert [resumed.rows_at(s).tolist() for s in range(17, 40)] == uninterrupted[17:]


def test_resuming_late_is_not_slower():
    """A step in epoch 10⁶ computes only that epoch."""
    order = Order(((30, 1.0), (11, 0.3)), batch=4, seed=9)
    assert sorted(epoch(order, 10**6))[:30] == list(range(30))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_weight_is_the_number_of_repetitions_per_epoch(shuffle):
    sources = ((10, 2.0), (10, 0.5), (9, 1.5), (4, 1.0))
    order = Order(sources, batch=4, seed=1, shuffle=shuffle)
    counts = [Counter(epoch(order, e)) for e in range(2)]
    assert order.rows_per_epoch == 20 + 5 + 14 + 4
    assert all(c[r] == 2 for c in counts for r in range(10))
    drawn = [{r for r in c if 10 <= r < 20} for c in counts]
    assert len(drawn[0]) == 5 and drawn[0] | drawn[1] == set(range(10, 20))
    total = counts[0] + counts[1]
    assert all(total[r] == 3 for r in range(20, 29))  # 14 and 13 draws from 9 rows
    assert all(c[r] == 1 for c in counts for r in range(29, 33))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("rows", "weight", "epochs", "total"),
    [(6, 0.25, 8, 12), (7, 0.1, 10, 7), (3, 0.01, 100, 3), (9, 1 / 3, 4, 12), (5, 1.1, 3, 17)],
)
def test_fractional_weights_are_exact_over_a_run(batch, rows, weight, epochs, total):
    """Rounded in each epoch, 6 rows of weight 0.25 would be 16 in eight epochs, and not 12."""
    order = Order(((rows, weight),), batch, seed=2)
    seen = [row for e in range(epochs) for row in epoch(order, e)]
    assert len(seen) == total
    counts = Counter(seen)
    assert max(counts.values()) - min(counts[r] for r in range(rows)) <= 1
    steps = int(epochs * order.mean_steps_per_epoch(epochs))
    taken = np.concatenate([order.rows_at(step) for step in range(steps)])
    assert (taken != PADDING_ROW).sum() == total
    if batch == 1:
        assert steps == total


def test_the_mean_of_steps_is_whole_for_whole_weights():
    order = Order(((7, 1.0), (3, 2.0)), batch=4)
    assert order.mean_steps_per_epoch(2.5) == order.steps_per_epoch == 4
    assert order.mean_steps_per_epoch(1e15) == 4, "in constant memory"


def test_sources_are_sampled_independently():
    order = Order(((40, 0.5), (40, 0.5)), batch=40, seed=1)
    rows = np.array(epoch(order, 0))
    assert set(rows[rows < 40]) != set(rows[rows >= 40] - 40)


def test_a_small_weight_still_gives_a_row():
    assert Order(((3, 0.01),), batch=2).rows_per_epoch == 1


def test_without_shuffling_the_order_is_that_of_the_files():
    order = Order(((3, 1.0), (2, 2.0), (4, 0.5)), batch=4, shuffle=False)
    assert epoch(order, 0) == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert epoch(order, 1) == [0, 1, 2, 3, 4, 3, 4, 7, 8]


def test_golden_order():
    """The order identifies a run: changing it would break resuming old runs."""
    passes = np.random.default_rng((5, 1, 1)).permutation(6)
    wanted = passes[np.random.default_rng((5, 0)).permutation(6)]
    assert epoch(Order(((6, 1.0),), batch=4, seed=5), 0) == wanted.tolist()
