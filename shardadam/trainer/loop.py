"""The training run: resume or begin, step, report, save, and stop when asked to."""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam import runtime
from shardadam.trainer import data
from shardadam.trainer.agreement import check_alike, stop_agreement
from shardadam.trainer.build import create_state, make_train_step, state_bytes
from shardadam.trainer.config import ConfigError, TrainConfig
from shardadam.trainer.corpus import Corpus, load_corpus
from shardadam.trainer.devices import build_mesh, mesh_text, start_devices
from shardadam.trainer.evaluate import Evaluation, evaluate
from shardadam.trainer.metrics import Metrics, NoMetrics
from shardadam.trainer.run_dir import check_resume, checkpoint_directory, refusal_to_begin, run_directory, write_run
from shardadam.trainer.signals import StopSignals
from shardadam.trainer.watchdog import Watchdog

_FOREVER = 10**6  # seconds
_MOST_SKIPPED = 100  # steps on end: more than a dynamic loss scale ever needs to come down to 1.

log = logging.getLogger("shardadam.trainer")


class TrainingError(RuntimeError):
    """The run cannot go on, though nothing is wrong with what the user gave."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """How a run ended."""

    state: shardadam.TrainState
    """The last state."""
    stopped: bool
    """Whether a signal ended it before its last step."""
    checkpoint: Path
    """The newest checkpoint."""
    eval: Evaluation | None = None
    """None where the run was stopped."""

    def summary(self) -> str:
        """What a person wants to know at the end."""
        plan, step = self.state.plan, int(self.state.step)
        ours, whole = state_bytes(self.state)
        lines = [f"stopped at step {step}, saved; run again to go on" if self.stopped else f"done: step {step}"]
        if self.eval is not None:
            lines.append("eval:           " + self.eval.summary())
        lines.append(
            f"Adam's state:   {ours:,} bytes per device, in {plan.num_shards} shards; "
            f"replicated Adam would hold {whole:,} ({ours / whole:.1%})"
        )
        lines.append(f"checkpoint:     {self.checkpoint}")
        return "\n".join(lines)


def train(config: TrainConfig) -> Result:
    """Runs a config to its last step: starts anew, or goes on from the run's newest checkpoint.

    Raises:
      ConfigError: something that the user can set right, such as that all steps are gone or damaged.
      TrainingError: the loss is no longer finite, or devices have come to hold different bits; the checkpoints before
        that are kept.
      SaveError: a checkpoint could not be saved; with `on_save_error: warn` only if it is the last.
    """
    seconds = asdict(config.deadlines)
    num_processes = runtime.initialize(
        heartbeat_seconds=seconds.pop("heartbeat"), timeout_seconds=math.ceil(seconds["start"] or _FOREVER)
    )
    start_devices(config, num_processes)
    with StopSignals() as signals, Watchdog(seconds) as watchdog:  # after `initialize`, which takes SIGTERM's handler
        watchdog.begin("start")
        mesh = build_mesh(config)
        data.check_batch(config, mesh.shape["data"])
        corpus = load_corpus(config.data, vocab_size=config.model.vocab_size, window=config.model.max_len + 1)
        check_alike(config, corpus.sha256)
        directory = checkpoint_directory(config)
        with (
            stop_agreement(signals.requested) as stop,
            shardadam.Checkpointer(
                directory,
                max_to_keep=config.max_to_keep,
                keep_period=config.keep_period,
                config=asdict(config),
                on_error=config.on_save_error,
            ) as checkpointer,  # fmt: skip
        ):
            checkpointer.lock()  # before anything of the run's is written
            state, latest = _begin(config, mesh, corpus, checkpointer, watchdog)
            return _Run(config, corpus, checkpointer, watchdog, stop, saved=latest).to_the_end(state)


def _begin(
    config: TrainConfig, mesh: Mesh, corpus: Corpus, checkpointer: shardadam.Checkpointer, watchdog: Watchdog
) -> tuple[shardadam.TrainState, int | None]:
    """The state to go on with, and the step that it was saved at; None for a new run."""
    # Process 0's word: on a shared disk others may see a step later.
    latest = json.loads(runtime.from_process_zero("latest", json.dumps(checkpointer.latest_step())))
    if latest is not None:
        check_resume(config, corpus.sha256)
    elif refusal := runtime.from_process_zero("begin", refusal_to_begin(config)):
        raise ConfigError(refusal)
    state = create_state(config, mesh)
    _record(config, corpus, state)
    if latest is not None:
        watchdog.begin("restore")
        state = checkpointer.restore(state)  # An older one, if that is damaged.
        latest = checkpointer.restored_step
        log.info("going on at step %d, from %s", latest, checkpointer.directory / str(latest))
    shardadam.audit(state, state.plan)
    return state, latest


class _Run:
    """The loop. Steps run ahead on the devices; only `_fetch` waits for them."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        checkpointer: shardadam.Checkpointer,
        watchdog: Watchdog,
        stop: Callable[[], bool],
        *,
        saved: int | None,
    ) -> None:
        self.config, self.corpus, self.checkpointer, self.saved = config, corpus, checkpointer, saved
        self.watchdog, self.stop = watchdog, stop
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.skipped_in_a_row = 0
        self.since = time.perf_counter()
        self.checked: int | None = None

    def to_the_end(self, state: shardadam.TrainState) -> Result:
        """Trains what is left, saves, evaluates."""
        start, steps, directory = int(state.step), self.config.steps, run_directory(self.config)
        if start >= steps:
            log.info("already at step %d, 'steps' is %d: nothing to train; raise 'steps' to go on", start, steps)
        self.metrics = NoMetrics()
        if jax.process_index() == 0:
            self.metrics = Metrics(
                directory, first_step=start, steps=max(start, steps), tensorboard=self.config.tensorboard
            )
        with self.metrics:
            state = self._train(state, start)
            shardadam.audit(state, state.plan)
            step = int(state.step)
            self._save(step, state)
            self.metrics.pause()
            stopped = step < steps
            evaluation = None if stopped else self._evaluate(step, state)
        self.watchdog.begin("save")
        self.checkpointer.wait()
        checkpoint = directory / "checkpoints" / str(self.saved)
        return Result(state=state, stopped=stopped, checkpoint=checkpoint, eval=evaluation)

    def _train(self, state: shardadam.TrainState, start: int) -> shardadam.TrainState:
        config, train_step = self.config, make_train_step(self.config.train_step, state)
        sharding = NamedSharding(state.plan.mesh, P("data"))
        for step in range(start + 1, config.steps + 1):
            self.watchdog.begin("compile" if step == start + 1 else "step", times=1 + len(self.pending))
            if self.stop():
                break
            self.checkpointer.check()
            batch = data.place_train_batch(self.corpus.train, config, step - 1, sharding)
            state, metrics = train_step(state, batch)
            self.pending.append((step, metrics))
            if step == start + 1:
                self._fetch(compiled=True)
            elif step % config.log_every == 0:
                self._fetch()
            if config.check_every and step % config.check_every == 0:
                self._check(step, state)
            if step % config.save_every == 0:
                self._save(step, state)
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                self._fetch()
                self._evaluate(step, state)
        self._fetch()
        return state

    def _fetch(self, *, compiled: bool = False) -> None:
        """Brings the metrics of the steps since the last time to the host, and reports them."""
        if not self.pending:
            return
        if not compiled:
            self.watchdog.begin("step", times=len(self.pending))
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self.pending]
        self.pending = []
        now = time.perf_counter()
        rate = len(fetched) * self.config.batch_size * self.config.model.max_len / (now - self.since)
        for step, metrics in fetched:
            self._check_finite(step, metrics)
            self.metrics.write(step, {name: float(value) for name, value in metrics.items()})
        if compiled:
            log.info("compiled and took the first step in %.1f s", now - self.since)
        else:
            self.metrics.write(fetched[-1][0], {"tokens_per_second": rate})
        self.metrics.show(fetched[-1][0], sum(float(m["loss"]) for _, m in fetched) / len(fetched), rate)
        self.since = now

    def _check_finite(self, step: int, metrics: dict[str, Any]) -> None:
        """Ends the run at a loss that is not finite, or after many steps on end that were skipped for that."""
        loss, norm, skipped = (float(metrics[name]) for name in ("loss", "grad_norm", "skipped"))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite or (skipped and self.skipped_in_a_row < _MOST_SKIPPED):
            return
        raise TrainingError(
            f"step {step}: the loss is {loss} and the gradients' norm {norm}"
            + (f", as in the {_MOST_SKIPPED - 1} steps before, all skipped" if skipped else "")
            + f"; nothing was saved since step {self.saved}. Lower 'optimizer.learning_rate' or set "
            "'train_step.max_grad_norm', and begin anew under another 'name'"
        )

    def _save(self, step: int, state: shardadam.TrainState) -> None:
        if step == self.saved:
            return
        self._fetch()  # a state that is not finite must not push a good one out
        if self.config.check_every:
            self._check(step, state)
        self.watchdog.begin("save")
        self.checkpointer.save(step, state)
        self.saved = step
        self.since = time.perf_counter()

    def _check(self, step: int, state: shardadam.TrainState) -> None:
        """Stops where devices have come to hold different bits: what they make of them is worth nothing."""
        if step == self.checked:
            return
        self.watchdog.begin("step" if self.checked else "compile", times=1 + len(self.pending))
        try:
            shardadam.check_replicas(state)
        except shardadam.DivergenceError as error:
            raise TrainingError(f"step {step}: {error}. Nothing was saved since step {self.saved}") from error
        self.checked = step

    def _evaluate(self, step: int, state: shardadam.TrainState) -> Evaluation | None:
        batches = itertools.count()

        def stop() -> bool:
            self.watchdog.begin("step" if next(batches) else "compile")
            return self.stop()

        evaluation = evaluate(state, self.corpus, self.config, stop=stop)
        if evaluation is not None:
            scores = {f"eval_{name}": value for name, value in asdict(evaluation).items() if value is not None}
            self.metrics.write(step, scores)
            log.info("step %d: eval %s", step, evaluation.summary())
        self.since = time.perf_counter()
        return evaluation


def _record(config: TrainConfig, corpus: Corpus, state: shardadam.TrainState) -> None:
    """Writes the run's files, and tells what is about to be trained."""
    plan, device = state.plan, state.plan.mesh.devices.flat[0]
    facts = {
        "mesh": mesh_text(dict(plan.mesh.shape)),
        "device": device.device_kind,
        "num_processes": jax.process_count(),
        "num_params": sum(x.size for x in jax.tree.leaves(state.params)),
        "train_tokens": len(corpus.train),
        "eval_tokens": len(corpus.eval),
    }
    if jax.process_index() == 0:
        report = plan.report(config.optimizer.mu_dtype, config.train_step.master_dtype)
        write_run(config, sha256=corpus.sha256, report=report, facts=facts)
    told = "{num_params:,} parameters on {mesh} ({device}), {train_tokens:,} training tokens".format(**facts)
    log.info("%s: %s, sha256 %s...", run_directory(config), told, corpus.sha256[:16])
