"""The training step: loss, accumulation, gradient of the trainable tree only, update. Pure.

The model is an argument: anything with ``features(params, input_ids, positions, segment_ids)``
giving (B, T, D), ``head(params, features, start, size)`` giving float32 logits (B, t, V) or those
of ``size`` tokens from ``start`` on, ``packed_head(params)``, and in ``config`` ``num_outputs`` (V)
and ``num_labels``, which is None unless the outputs are classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jlora.distributed.sharding import rows_each
from jlora.ops.matmul import barrier_after
from jlora.training.state import TrainState

IGNORE = -100
"""The label of positions without loss, as in transformers."""

CHUNK_ELEMENTS = 2**24
"""Logits a device computes at once (64 MiB of float32); more go through the head in chunks."""

Batch = Mapping[str, Array]
Bind = Callable[[Any, Any, Array | None], Any]
"""``bind(frozen, trainable, key)`` makes the parameters of one forward pass."""


def loss_and_count(
    model: Any, params: Any, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The summed cross-entropy (nats) of the labelled tokens, and how many there are.

    Args:
      model: see the module's header.
      params: what ``model`` takes.
      batch: int32 arrays (B, T): ``input_ids``, ``labels`` (the token that follows, or the class
        of a text that ends here, or -100), ``positions``, ``segment_ids``.
    """
    return _loss_of(model, params, _features(model, params, batch), batch["labels"])


def _features(model: Any, params: Any, batch: Batch) -> Float[Array, "batch length dim"]:
    return model.features(
        params, batch["input_ids"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )


def _loss_of(
    model: Any,
    params: Any,
    features: Float[Array, "batch length dim"],
    labels: Int[Array, "batch length"],
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """See ``loss_and_count``."""
    batch_size, length = labels.shape
    vocab = model.config.num_outputs

    def chunk_loss(start):
        h = jax.lax.dynamic_slice_in_dim(features, start, size, axis=1)
        y = jax.lax.dynamic_slice_in_dim(labels, start, size, axis=1)
        return cross_entropy(model.head(params, h), y)

    size = _chunk_length(rows_each(batch_size), length, vocab)
    if model.packed_head(params):
        head = functools.partial(model.head, params, features)
        total = cross_entropy_by_tokens(head, labels, vocab)
    elif size == length:
        total = cross_entropy(model.head(params, features), labels)
    else:
        # Checkpointed: one chunk's logits exist at a time, in the backward pass too.
        total = jax.lax.map(jax.checkpoint(chunk_loss), jnp.arange(0, length, size)).sum()
    return total, jnp.sum(labels != IGNORE)


def cross_entropy(
    logits: Float[Array, "batch length vocab"], labels: Int[Array, "batch length"]
) -> Float[Array, ""]:
    """The summed negative log-likelihood of the labels that are not -100; 0 when there are none."""
    tokens, zero = barrier_after((jnp.arange(logits.shape[-1]), jnp.float32(0.0)), logits)
    picked = jnp.sum(jnp.where(labels[..., None] == tokens, logits, zero), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(labels == IGNORE, 0.0, losses))


def cross_entropy_by_tokens(
    head: Callable[..., Array], labels: Int[Array, "batch length"], vocab: int
) -> Float[Array, ""]:
    """``cross_entropy`` of the logits that ``head(start, size=n)`` gives for some of the tokens.

    Each part of a packed head is dequantized once here and once for the gradient, and never all of
    it; parts of the sequence would each dequantize the whole.
    """
    size = min(vocab, max(1, CHUNK_ELEMENTS // (rows_each(labels.shape[0]) * labels.shape[1])))

    def part(first):
        start = jnp.minimum(first, vocab - size)  # the last part overlaps the one before it
        logits, tokens = head(start, size=size), start + jnp.arange(size)
        zero, nothing = barrier_after((jnp.float32(0.0), jnp.float32(-jnp.inf)), logits)
        chosen = (labels[..., None] == tokens) & (tokens >= first)
        picked = jnp.sum(jnp.where(chosen, logits, zero), axis=-1)
        return jax.nn.logsumexp(jnp.where(tokens >= first, logits, nothing), axis=-1), picked

    sums, picked = jax.lax.map(jax.checkpoint(part), jnp.arange(0, vocab, size))
    losses = jax.nn.logsumexp(sums, axis=0) - picked.sum(axis=0)
    return jnp.sum(jnp.where(labels == IGNORE, 0.0, losses))


def _chunk_length(rows: int, length: int, vocab_size: int) -> int:
    """The longest divisor of ``length`` whose logits of all rows stay within CHUNK_ELEMENTS."""
    fits = max(1, CHUNK_ELEMENTS // (rows * vocab_size))
    return next(c for c in range(min(fits, length), 0, -1) if length % c == 0)


def make_train_step(
    model: Any,
    bind: Bind,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    state_shardings: Any = None,
    several: bool = False,
    compiler_options: dict[str, str] | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Array]]]:
    """The jitted step ``(state, frozen, batch) -> (state, metrics)``; ``state`` is donated.

    ``batch`` holds arrays (accumulation, B, T). The loss of the step is the summed loss of all its
    micro-batches over all their labelled tokens, whichever device or micro-batch they are on, so
    that accumulation changes nothing. Dropout is a function of (seed, step, micro-batch).

    Metrics: ``loss``, ``grad_norm`` (before clipping), ``target_tokens``, ``tokens`` (all that are
    not padding), ``finite`` (loss and gradient are), ``weights_finite`` (after the update), and
    ``alive``: for each trainable leaf, in tree order, whether its gradient is not all zero.

    With ``several`` the state, the batch and the metrics have a leading axis of trainable trees:
    each is trained on its own part of the batch as if it were alone, and the frozen parameters are
    read once for all. ``compiler_options`` are XLA's (``sharding.compiler_options``).
    """

    def train_step(state: TrainState, frozen: Any, batch: Batch):
        count = jnp.sum(batch["labels"] != IGNORE)
        scale = state.loss_scale.scale if state.loss_scale else jnp.float32(1.0)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        per_token = scale / jnp.maximum(count, 1).astype(jnp.float32)

        def objective(trainable, micro, key):
            total, _ = loss_and_count(model, bind(frozen, trainable, key), micro)
            return total * per_token

        loss, grads = _accumulate(jax.value_and_grad(objective), state.trainable, batch, key)
        loss = loss / scale
        grads = jax.tree.map(lambda g: g / scale, grads) if state.loss_scale else grads
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        state = _apply(state, grads, optimizer, finite)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "target_tokens": count,
            "tokens": jnp.sum(batch["segment_ids"] != 0),
            "finite": finite,
            "weights_finite": jnp.stack(
                [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.trainable)]
            ).all(),
            "alive": jnp.stack([jnp.max(jnp.abs(g)) != 0 for g in jax.tree.leaves(grads)]),
        }
        return state, metrics

    shardings = None if state_shardings is None else (state_shardings, None)
    if several:
        train_step = jax.vmap(train_step, in_axes=(0, None, 0))
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=shardings,
        compiler_options=compiler_options,
    )


def make_eval_step(
    model: Any, bind: Bind, compiler_options: dict[str, str] | None = None
) -> Callable[[Any, Any, Batch], tuple[Array, Array, Array | None]]:
    """The jitted ``(trainable, frozen, batch) -> (loss, count, classes)``; no dropout.

    The summed loss and the number of labelled tokens; ``classes`` are a classifier's
    ``class_counts``, else None.
    """

    def eval_step(trainable: Any, frozen: Any, batch: Batch):
        params = bind(frozen, trainable, None)
        features = _features(model, params, batch)
        total, count = _loss_of(model, params, features, batch["labels"])
        if model.config.num_labels is None:
            return total, count, None
        return total, count, class_counts(model.head(params, features), batch["labels"])

    return jax.jit(eval_step, compiler_options=compiler_options)


def class_counts(
    logits: Float[Array, "batch length classes"], labels: Int[Array, "batch length"]
) -> Int[Array, "3 classes"]:
    """For each class: how often it was predicted rightly, predicted, and the label."""
    classes = jnp.arange(logits.shape[-1])
    labelled = labels[..., None] == classes
    predicted = (jnp.argmax(logits, -1)[..., None] == classes) & (labels != IGNORE)[..., None]
    return jnp.stack([jnp.sum(x, (0, 1)) for x in (predicted & labelled, predicted, labelled)])


def _accumulate(value_and_grad, trainable, batch: Batch, key: Array):
    """The sums of loss and gradients over the micro-batches, one at a time."""
    steps = batch["labels"].shape[0]
    if steps == 1:
        micro = {k: v[0] for k, v in batch.items()}
        return value_and_grad(trainable, micro, jax.random.fold_in(key, 0))

    def add(total, x):
        index, micro = x
        one = value_and_grad(trainable, micro, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, one), None

    zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zero, (jnp.arange(steps), dict(batch)))[0]


def _select(condition: Array, new: Array, old: Array) -> Array:
    """One of two leaves, in their memory: only the device's own can be computed with."""
    space = jax.typeof(old).memory_space
    new, old = jax.device_put((new, old), jax.memory.Space.Device)
    return jax.device_put(jnp.where(condition, new, old), space)


def _apply(state: TrainState, grads: Any, optimizer, finite: Array) -> TrainState:
    """The next state; with loss scaling a step that overflowed changes only the scale."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    if state.loss_scale is None:
        return TrainState(state.step + 1, trainable, opt_state)

    def keep(new, old):
        return jax.tree.map(functools.partial(_select, finite), new, old)

    return TrainState(
        state.step + 1,
        keep(trainable, state.trainable),
        keep(opt_state, state.opt_state),
        state.loss_scale.updated(finite),
    )
