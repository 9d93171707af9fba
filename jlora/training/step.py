"""The training step: loss, gradient accumulation, gradient of the trainable tree only, update.

Pure functions. The model is an argument, any object with

- ``features(params, input_ids, positions, segment_ids)``: the last hidden states (B, T, D);
- ``head(params, features, start, size)``: float32 logits (B, T, V), or (B, T, size) of the
  vocabulary entries from ``start`` on;
- ``head_weight(params)``: the weight of that head;
- ``config.num_outputs`` (V), and ``config.num_labels``: None unless the outputs are classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jlora.data.examples import IGNORE
from jlora.distributed.constraints import gather_dense, rows_per_device
from jlora.distributed.mesh import target_platform
from jlora.ops.matmul import barrier_after
from jlora.ops.weights import has_quantized_base
from jlora.training.state import TrainState

CHUNK_ELEMENTS = 2**24
"""The most logits that a device computes at once (64 MiB of float32)."""

GPU_CHUNK_ELEMENTS = 2**26
"""The same on GPUs. Every chunk reads the whole head: of the 128 tokens that 2**24 allows Llama 3
reading takes longer than the product. By the compiler the step's peak is the same (docs/log.md)."""

Batch = Mapping[str, Array]
Bind = Callable[[Any, Any, Array | None], Any]
"""``bind(frozen, trainable, dropout_key)``: the parameters of one forward pass."""


def loss_and_count(
    model: Any, params: Any, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The summed cross-entropy (nats) of the labelled tokens, and how many there are.

    Args:
      model: see the module's docstring.
      params: its parameters, with an adapter attached or not.
      batch: int32 arrays (B, T): ``input_ids``, ``labels`` (the next token, or the class of the
        text whose last token this is, or -100), ``positions``, ``segment_ids``.
    """
    return _loss_from_features(model, params, _features(model, params, batch), batch["labels"])


def _features(model: Any, params: Any, batch: Batch) -> Float[Array, "batch length dim"]:
    return model.features(
        params, batch["input_ids"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )


def _loss_from_features(
    model: Any,
    params: Any,
    features: Float[Array, "batch length dim"],
    labels: Int[Array, "batch length"],
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The results of ``loss_and_count``; the logits never exist all at once if they are many."""
    batch_size, length = labels.shape
    vocab = model.config.num_outputs

    def chunk_loss(start):
        h = jax.lax.dynamic_slice_in_dim(features, start, size, axis=1)
        y = jax.lax.dynamic_slice_in_dim(labels, start, size, axis=1)
        return cross_entropy(model.head(gathered, h), y)

    size = _chunk_length(rows_per_device(batch_size), length, vocab)
    if has_quantized_base(model.head_weight(params)):
        head = functools.partial(model.head, params, features)
        total = cross_entropy_in_vocab_chunks(head, labels, vocab)
    elif size == length:
        total = cross_entropy(model.head(params, features), labels)
    else:
        # The head; of the other leaves nothing is computed.
        gathered = gather_dense(params)
        # Rematerialised, so that only one chunk's logits exist in the backward pass, too.
        total = jax.lax.map(jax.checkpoint(chunk_loss), jnp.arange(0, length, size)).sum()
    return total, jnp.sum(labels != IGNORE)


def cross_entropy(
    logits: Float[Array, "batch length vocab"], labels: Int[Array, "batch length"]
) -> Float[Array, ""]:
    """The summed negative log-likelihood of the labels that are not -100; 0 if there are none."""
    # The barrier keeps these constants, broadcast to the logits' shape, inside a loop over chunks.
    tokens, zero = barrier_after((jnp.arange(logits.shape[-1]), jnp.float32(0.0)), logits)
    # Not take_along_axis: its gradient is a scatter, and logits that are sharded over the
    # vocabulary would be gathered for it.
    picked = jnp.sum(jnp.where(labels[..., None] == tokens, logits, zero), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(labels == IGNORE, 0.0, losses))


def cross_entropy_in_vocab_chunks(
    head: Callable[..., Array], labels: Int[Array, "batch length"], vocab: int
) -> Float[Array, ""]:
    """``cross_entropy`` of logits ``head(start, size=n)``, one range of the vocabulary at a time.

    For quantized heads. Each range of the head is dequantized once in the forward and once in the
    backward pass, and the dense head never exists; chunks of the sequence would dequantize all of
    it once for each chunk.
    """
    tokens_per_device = rows_per_device(labels.shape[0]) * labels.shape[1]
    size = min(vocab, max(1, chunk_elements() // tokens_per_device))

    def vocab_chunk(first):
        start = jnp.minimum(first, vocab - size)  # the last chunk overlaps the previous one
        logits, tokens = head(start, size=size), start + jnp.arange(size)
        zero, excluded = barrier_after((jnp.float32(0.0), jnp.float32(-jnp.inf)), logits)
        is_label = (labels[..., None] == tokens) & (tokens >= first)
        picked = jnp.sum(jnp.where(is_label, logits, zero), axis=-1)
        return jax.nn.logsumexp(jnp.where(tokens >= first, logits, excluded), axis=-1), picked

    sums, picked = jax.lax.map(jax.checkpoint(vocab_chunk), jnp.arange(0, vocab, size))
    losses = jax.nn.logsumexp(sums, axis=0) - picked.sum(axis=0)
    return jnp.sum(jnp.where(labels == IGNORE, 0.0, losses))


def make_train_step(
    model: Any,
    bind: Bind,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    state_shardings: Any = None,
    multi_adapter: bool = False,
    compiler_options: dict[str, str] | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Array]]]:
    """The jitted step ``(state, frozen, batch) -> (state, metrics)``; ``state`` is donated.

    The batch has arrays (accumulation, B, T). The step's loss is the summed loss of all
    micro-batches divided by the number of all their labelled tokens, on whichever device they are:
    how a batch is divided into micro-batches changes nothing. Dropout is a function of (seed, step,
    micro-batch).

    Metrics: ``loss``, ``grad_norm`` (before clipping), ``target_tokens`` (labelled), ``tokens``
    (not padding), ``finite`` (whether loss and gradient are), ``weights_finite`` (whether the
    updated weights are), and ``has_gradient``: for each trainable leaf, in tree order, whether its
    gradient has a nonzero element.

    Args:
      model: see the module's docstring.
      bind: combines frozen and trainable parameters.
      optimizer: for the trainable tree.
      seed: of dropout.
      state_shardings: a sharding for every leaf of the state; None lets XLA choose.
      multi_adapter: the state, the batch and the metrics have a leading axis of adapters. Each is
        trained on its own part of the batch as if alone; the frozen parameters are read once.
      compiler_options: XLA's, see ``mesh.compiler_options``.
    """

    def train_step(state: TrainState, frozen: Any, batch: Batch):
        # Of the whole step: the mean of micro-batches' means would weigh a token by how many others
        # are in its micro-batch.
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
        # A NaN or an infinity in any gradient reaches the norm.
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        state = _apply_update(state, grads, optimizer, finite)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "target_tokens": count,
            "tokens": jnp.sum(batch["segment_ids"] != 0),
            "finite": finite,
            "weights_finite": jnp.stack(
                [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.trainable)]
            ).all(),
            # A NaN is a gradient, too: `finite` reports it.
            "has_gradient": jnp.stack([jnp.max(jnp.abs(g)) != 0 for g in jax.tree.leaves(grads)]),
        }
        return state, metrics

    # Fixed, so that the donated buffers fit the results, and the next step's arguments are those
    # that the step was compiled for.
    shardings = None if state_shardings is None else (state_shardings, None)
    if multi_adapter:  # loss, clipping, moments and dropout are then per adapter without more ado
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
    """The jitted ``(trainable, frozen, batch) -> (loss, count, class counts)``; no dropout.

    ``loss`` is summed over the ``count`` labelled tokens. The last is ``class_counts`` for a
    classifier and None for a language model.
    """

    def eval_step(trainable: Any, frozen: Any, batch: Batch):
        params = bind(frozen, trainable, None)
        features = _features(model, params, batch)
        total, count = _loss_from_features(model, params, features, batch["labels"])
        if model.config.num_labels is None:
            return total, count, None
        return total, count, class_counts(model.head(params, features), batch["labels"])

    return jax.jit(eval_step, compiler_options=compiler_options)


def class_counts(
    logits: Float[Array, "batch length classes"], labels: Int[Array, "batch length"]
) -> Int[Array, "3 classes"]:
    """For each class: its correct predictions, all its predictions, and its labels."""
    classes = jnp.arange(logits.shape[-1])
    labelled = labels[..., None] == classes
    predicted = (jnp.argmax(logits, -1)[..., None] == classes) & (labels != IGNORE)[..., None]
    return jnp.stack([jnp.sum(x, (0, 1)) for x in (predicted & labelled, predicted, labelled)])


def _accumulate(value_and_grad, trainable, batch: Batch, key: Array):
    """Loss and gradients summed over the micro-batches, which are computed one after another."""
    steps = batch["labels"].shape[0]
    # Without the scan, which would hold a sum of gradients beside those of the one micro-batch.
    if steps == 1:
        micro = {k: v[0] for k, v in batch.items()}
        return value_and_grad(trainable, micro, jax.random.fold_in(key, 0))

    def add(total, x):
        index, micro = x
        result = value_and_grad(trainable, micro, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, result), None

    zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, trainable))
    # Each micro-batch reduces its gradients over `data`. Once a step would do, but saves less than
    # a hundredth: 168 MB, 0.7 of a micro-batch's 90 ms, for 8B with r 16 on 8 H200.
    return jax.lax.scan(add, zero, (jnp.arange(steps), dict(batch)))[0]


def _apply_update(state: TrainState, grads: Any, optimizer, finite: Array) -> TrainState:
    """The next state; with loss scaling, a step that overflowed changes the scale only."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    if state.loss_scale is None:
        return TrainState(state.step + 1, trainable, opt_state)

    def if_finite(new, old):
        return jax.tree.map(functools.partial(_where, finite), new, old)

    return TrainState(
        state.step + 1,
        if_finite(trainable, state.trainable),
        if_finite(opt_state, state.opt_state),
        state.loss_scale.updated(finite),
    )


def _where(condition: Array, new: Array, old: Array) -> Array:
    """``jnp.where`` for leaves that may be in host memory, where XLA cannot compute."""
    space = jax.typeof(old).memory_space
    new, old = jax.device_put((new, old), jax.memory.Space.Device)
    return jax.device_put(jnp.where(condition, new, old), space)


def chunk_elements() -> int:
    """The most logits that a device of the program being traced computes at once."""
    return GPU_CHUNK_ELEMENTS if target_platform() == "gpu" else CHUNK_ELEMENTS


def _chunk_length(rows: int, length: int, vocab_size: int) -> int:
    """The longest divisor of ``length`` whose logits, of all rows, are within ``chunk_elements``.

    ``rows`` are those of one device: with the rows of all devices the chunks get so short that a
    sharded head is gathered once for each of many.
    """
    # With all rows counted, 8 H200 gathered the head 128 times a pass: 69 GiB a step instead of 14.
    fits = max(1, chunk_elements() // (rows * vocab_size))
    return next(c for c in range(min(fits, length), 0, -1) if length % c == 0)
