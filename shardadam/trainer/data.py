"""Batches of token windows. Those of a step are a pure function of (seed, step): resuming needs no state."""

import bz2
import functools
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from shardadam.trainer.config import ConfigError, TrainConfig
from shardadam.trainer.corpus import EOS, Tokens

IGNORE = -1  # target of a position that is not scored

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)


class Batch(NamedTuple, Generic[ArrayT]):
    """Windows of tokens: `targets` is `inputs` one position later. Both [batch, length] int32."""

    inputs: ArrayT
    targets: ArrayT


def train_rows(tokens: Tokens, config: TrainConfig, step: int, rows: slice) -> Batch[np.ndarray]:
    """Rows of the global batch of a step, for a process that holds only these.

    Each row is a window at a random place of the text; the places depend on (seed, step) alone, not on the process.
    """
    window = config.model.max_len + 1
    places = np.array([max(len(segment) - window + 1, 0) for segment in tokens.segments])
    ends = np.cumsum(places)
    # Philox is keyed, not stepped: the draws of one step need none of those before it.
    seed = np.random.SeedSequence(config.seed, spawn_key=(step,))
    drawn = np.random.Generator(np.random.Philox(seed)).integers(ends[-1], size=config.batch_size)[rows]
    owners = np.searchsorted(ends, drawn, side="right")
    starts = drawn - (ends - places)[owners]
    windows = np.stack([tokens.window(int(i), int(start), window) for i, start in zip(owners, starts, strict=True)])
    return Batch(windows[:, :-1], windows[:, 1:])


def eval_batches(tokens: Tokens, config: TrainConfig) -> Iterator[Batch[np.ndarray]]:
    """The first `data.eval_tokens` tokens of the text, each a target once; what does not fill a batch is `IGNORE`."""
    length, left = config.model.max_len, config.data.eval_tokens
    windows: list[np.ndarray] = []
    for i, segment in enumerate(tokens.segments):
        for start in range(0, len(segment) - 1, length):
            if left <= 0:
                break
            real = tokens.window(i, start, min(length, left) + 1)
            left -= len(real) - 1
            windows.append(np.pad(real, (0, length + 1 - len(real)), constant_values=IGNORE))
    for first in range(0, len(windows), config.batch_size):
        rows = np.stack(windows[first : first + config.batch_size])
        rows = np.pad(rows, ((0, config.batch_size - len(rows)), (0, 0)), constant_values=IGNORE)
        yield Batch(np.maximum(rows[:, :-1], 0), rows[:, 1:])


def bz2_bits_per_byte(tokens: Tokens, config: TrainConfig) -> tuple[float, int]:
    """What `bz2 -9` makes of the very bytes that `eval_batches` scores: (bits per byte, how many bytes)."""
    targets = np.concatenate([np.ravel(batch.targets) for batch in eval_batches(tokens, config)])
    text = targets[(targets >= 0) & (targets < EOS)].astype(np.uint8).tobytes()
    return 8 * len(bz2.compress(text, 9)) / len(text), len(text)


def place_train_batch(tokens: Tokens, config: TrainConfig, step: int, sharding: NamedSharding) -> Batch[jax.Array]:
    """The global batch on the mesh; each process makes the rows of its own devices only."""
    shape = (config.batch_size, config.model.max_len)
    return _place(shape, sharding, lambda rows: train_rows(tokens, config, step, rows))


def place_batch(batch: Batch[np.ndarray], sharding: NamedSharding) -> Batch[jax.Array]:
    """A batch that every process has in full -> on the mesh."""
    return _place(batch.inputs.shape, sharding, lambda rows: Batch(*(x[rows] for x in batch)))


def check_batch(config: TrainConfig, data_axis: int) -> None:
    """Refuses a batch that the mesh's data axis does not divide."""
    if config.batch_size % data_axis:
        near = max(config.batch_size // data_axis, 1) * data_axis
        raise ConfigError(
            f"'batch_size' is {config.batch_size}, not divisible by {data_axis}, the mesh's 'data' axis; use {near}"
        )


def _place(
    shape: tuple[int, ...], sharding: NamedSharding, make: Callable[[slice], Batch[np.ndarray]]
) -> Batch[jax.Array]:
    made = functools.cache(lambda start, stop: make(slice(start, stop)))  # the devices of one model group share rows

    def field(number: int) -> jax.Array:
        return jax.make_array_from_callback(
            shape, sharding, lambda index: made(*(index or (slice(None),))[0].indices(shape[0])[:2])[number]
        )

    return Batch(field(0), field(1))
