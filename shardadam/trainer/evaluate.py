"""Scores a state on the held-out text, beside what a good old compressor makes of it."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.trainer import data
from shardadam.trainer.build import loss_function
from shardadam.trainer.config import TrainConfig
from shardadam.trainer.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores on the evaluation text."""

    loss: float
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: float | None = None
    """The whole text's cross-entropy in bits, over its bytes; None for tokens that are not bytes."""
    bz2_bits_per_byte: float | None = None
    """What `bz2 -9` takes for the same bytes."""
    num_bytes: int = 0
    """How many bytes were scored."""

    def summary(self) -> str:
        """One line."""
        if self.bits_per_byte is None:
            return f"loss {self.loss:.4f}, {self.loss / math.log(2):.4f} bits per token"
        return (
            f"{self.bits_per_byte:.4f} bits per byte; bz2 -9 takes {self.bz2_bits_per_byte:.4f} "
            f"for the same {self.num_bytes:,} bytes"
        )


@functools.lru_cache(maxsize=4)
def _eval_step(
    apply_fn: Callable[..., jax.Array], plan: shardadam.Plan, stage: int
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A jitted (params, batch) -> (nats, number of targets); compiled once for a run."""
    return jax.jit(shardadam.total_and_weight(loss_function(apply_fn), plan, stage=3 if stage == 3 else 2))


def evaluate(
    state: shardadam.TrainState, corpus: Corpus, config: TrainConfig, *, stop: Callable[[], bool] | None = None
) -> Evaluation | None:
    """Scores the evaluation text; None where `stop`, called before each batch, said so."""
    sharding = NamedSharding(state.plan.mesh, P("data"))
    eval_step = _eval_step(state.apply_fn, state.plan, state.stage)
    sums = []
    for batch in data.eval_batches(corpus.eval, config):
        if stop is not None and stop():
            return None
        sums.append(jax.device_get(eval_step(state.params, data.place_batch(batch, sharding))))
    nats, count = (math.fsum(float(x) for x in column) for column in zip(*sums, strict=True))
    if not corpus.bytes_per_token:
        return Evaluation(loss=nats / count)
    bz2, num_bytes = data.bz2_bits_per_byte(corpus.eval, config)
    # The end-of-document tokens' bits count, too: the model pays for knowing where a file ends, bz2 does not.
    bits = nats / math.log(2) / num_bytes
    return Evaluation(loss=nats / count, bits_per_byte=bits, bz2_bits_per_byte=bz2, num_bytes=num_bytes)
