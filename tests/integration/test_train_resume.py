"""Whole runs: stopped and resumed equals uninterrupted, bit for bit; signals save; what is said at the end is so."""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from tiny import tiny_config
from trees import flip_a_bit

from shardadam import Checkpointer, audit, unpack_params
from shardadam.checkpoint import CheckpointError, SaveError, saving
from shardadam.cli import main
from shardadam.trainer import loop
from shardadam.trainer.build import create_state
from shardadam.trainer.config import ConfigError
from shardadam.trainer.devices import build_mesh
from shardadam.trainer.evaluate import evaluate
from shardadam.trainer.loop import TrainingError, train
from shardadam.trainer.metrics import read_metrics
from shardadam.trainer.run_dir import run_directory

ROOT = Path(__file__).parents[2]
# Processes agree bit for bit only where XLA cuts their matrices alike. So those that are started here get the flags of
# this one, which its backend, started now, takes before `train` adds its own.
jax.devices()
FLAGS = os.environ["XLA_FLAGS"]
if "multi_thread_eigen" not in FLAGS:
    FLAGS += " --xla_cpu_multi_thread_eigen=true"
STEPS = 9


@pytest.fixture
def tiny(tmp_path):
    return functools.partial(tiny_config, tmp_path)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Most runs here are of the same few programs: keeps what is compiled for the next one."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def signals_are_for_pytest():
    """A run in this process would take them for itself: SIGTERM to pytest, as a time limit sends it, ended a run that
    was to raise, before it could.
    """
    with pytest.MonkeyPatch.context() as patch:
        asked = SimpleNamespace(requested=threading.Event())
        patch.setattr(loop, "StopSignals", lambda: contextlib.nullcontext(asked))
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, compile_once):
    config = tiny_config(tmp_path_factory.mktemp("whole"), steps=STEPS, eval_every=4)
    return config, train(config)


def assert_same_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y), err_msg=jax.tree_util.keystr(path))


def losses(config):
    return {r["step"]: r["loss"] for r in read_metrics(run_directory(config)) if "loss" in r}


def test_it_learns_and_says_so(uninterrupted):
    config, result = uninterrupted
    assert not result.stopped
    assert int(result.state.step) == STEPS
    curve = losses(config)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < curve[1] - 0.3
    assert 1 < result.eval.bits_per_byte < 9
    assert result.eval.num_bytes <= 500
    evaluated = [r["step"] for r in read_metrics(run_directory(config)) if "eval_bits_per_byte" in r]
    assert evaluated == [4, 8, 9]


def test_the_state_lives_in_shards(uninterrupted):
    _, result = uninterrupted
    plan, moments = result.state.plan, optax.tree.get(result.state.opt_state, "mu")
    audit(result.state, plan)
    mu_bytes = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(moments))
    assert 2 * mu_bytes + 4 == plan.state_bytes_per_device()
    said = result.summary()
    assert f"{plan.state_bytes_per_device():,} bytes per device, in 8 shards" in said
    assert f"replicated Adam would hold {plan.replicated_state_bytes():,}" in said
    assert str(result.checkpoint) in said
    assert result.checkpoint.is_dir()


@pytest.mark.parametrize("stop", [3, 8])
def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tiny, stop):
    config, whole = uninterrupted
    part = train(tiny(steps=stop))
    assert int(part.state.step) == stop
    rest = train(tiny(steps=STEPS, log_every=1))
    assert_same_bits(rest.state, whole.state)
    assert losses(tiny()) == losses(config)
    assert rest.eval == whole.eval


def test_at_the_last_step_already(uninterrupted, caplog):
    config, whole = uninterrupted
    with caplog.at_level("INFO", "shardadam.trainer"):
        again = train(config)
    assert f"already at step {STEPS}" in caplog.text
    assert again.eval == whole.eval
    assert_same_bits(again.state, whole.state)


@pytest.mark.slow
def test_stage_three_with_masters_resumes_and_goes_on_without(uninterrupted, tiny):
    config, _ = uninterrupted
    options = {
        "model": {"param_dtype": "bfloat16", "remat": True},
        "train_step": {"stage": 3, "master_dtype": "float32", "skip_nonfinite": True},
    }
    whole = train(tiny(steps=4, name="whole", **options))
    train(tiny(steps=2, **options))
    rest = train(tiny(steps=4, **options))
    assert_same_bits(rest.state, whole.state)
    assert rest.eval == whole.eval
    plan = rest.state.plan
    audit(rest.state, plan)
    kernel = rest.state.params["layers"]["mlp"]["up"]["kernel"]
    assert (kernel.dtype, kernel.addressable_shards[0].data.size) == (jax.numpy.bfloat16, kernel.size // 8)
    assert int(rest.state.num_skipped) == 0
    expected, got = losses(config), losses(tiny())
    np.testing.assert_allclose([got[i] for i in range(1, 5)], [expected[i] for i in range(1, 5)], rtol=0.01)
    changed = {"model": options["model"], "train_step": {"stage": 2, "num_microbatches": 1}}
    changed = tiny(**changed)
    with Checkpointer(run_directory(changed) / "checkpoints") as checkpointer:
        plain = checkpointer.restore(create_state(changed, build_mesh(changed)))
    assert (plain.stage, plain.master, int(plain.step)) == (2, None, 4)
    np.testing.assert_array_equal(plain.params["embedding"], unpack_params(rest.state.params, plan)["embedding"])


@pytest.mark.parametrize("mesh", ["data=4,model=2", "data=2"])
def test_goes_on_on_another_mesh(uninterrupted, mesh):
    config, whole = uninterrupted
    config = replace(config, mesh=mesh)
    # The very state, elsewhere; a layer summed over another number of devices rounds differently.
    like = create_state(config, build_mesh(config))
    with Checkpointer(run_directory(config) / "checkpoints") as checkpointer:
        moved = checkpointer.restore(like)
    audit(moved, like.plan)
    assert_same_bits(moved.params, whole.state.params)
    assert len(set(jax.tree.leaves(moved.params)[0].devices())) == like.plan.mesh.size


@pytest.mark.slow
def test_tensor_parallel_training_follows_data_parallel(uninterrupted, tiny):
    config, _ = uninterrupted
    result = train(tiny(steps=4, mesh="data=4,model=2"))
    split = result.state.params["layers"]["mlp"]["up"]["kernel"]
    assert split.addressable_shards[0].data.shape == (2, 16, 16)
    expected, got = losses(config), losses(tiny())
    np.testing.assert_allclose([got[i] for i in range(1, 5)], [expected[i] for i in range(1, 5)], rtol=1e-4)


def test_another_model_is_refused_and_nothing_is_touched(uninterrupted):
    config, whole = uninterrupted
    before = (run_directory(config) / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"'model.d_ff' was 32, is 64"):
        train(replace(config, model=replace(config.model, d_ff=64)))
    assert (run_directory(config) / "config.yaml").read_text() == before
    assert whole.checkpoint.is_dir()


def test_damage_to_every_step_is_not_trained_over(uninterrupted, tiny, capsys):
    """The start that finds the damage ends with an error; those after it, by a launcher, must not begin at step 0."""
    config = tiny(steps=STEPS)
    directory = run_directory(config)
    shutil.copytree(run_directory(uninterrupted[0]), directory)
    for manifest in directory.glob("checkpoints/*/state/manifest.ocdbt"):
        content = manifest.read_bytes()
        manifest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="none of its steps is what its seal says"):
        train(config)
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(asdict(config)))
    assert main(["train", str(path)]) == 2  # which `shardadam launch` does not start again after
    said = capsys.readouterr().err
    assert (
        f"steps {STEPS} had been saved, and are damaged: see the .txt of each in {directory}/checkpoints/damaged"
        in said
    )
    assert {path: path.read_bytes() for path in before} == before


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tiny):
    config = tiny(
        steps=STEPS,
        save_every=1,
        train_step={"max_grad_norm": None},
        optimizer={"learning_rate": 1e30, "warmup_steps": 0},
    )
    with pytest.raises(TrainingError, match=r"step \d: the loss is .*; nothing was saved since step \d"):
        train(config)
    with Checkpointer(run_directory(config) / "checkpoints") as checkpointer:
        state = checkpointer.restore(create_state(config, build_mesh(config)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.opt_state)))


def test_a_device_that_goes_its_own_way_stops_the_run_before_it_is_saved(tiny, monkeypatch):
    make_train_step = loop.make_train_step

    def faulty_step(state, batch, train_step):
        if int(state.step) == 5:
            wrong = jax.tree.map(lambda x: flip_a_bit(x, 6), state.params["final_norm"])
            state = state.replace(params=state.params | {"final_norm": wrong})
        return train_step(state, batch)

    monkeypatch.setattr(
        loop, "make_train_step", lambda *args: functools.partial(faulty_step, train_step=make_train_step(*args))
    )
    config = tiny(steps=STEPS, save_every=3, check_every=2)
    with pytest.raises(TrainingError, match=r"(?s)step 6: .*`params/final_norm.*`: device 6 .*saved since step 3"):
        train(config)
    with Checkpointer(run_directory(config) / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 3


@pytest.mark.parametrize(("on_save_error", "last"), [("raise", 4), ("warn", STEPS)])
def test_a_checkpoint_that_cannot_be_saved(tiny, monkeypatch, on_save_error, last):
    """A disk that is full while step 4 is saved: the run ends at the next step, or goes on, and saves again."""
    config = tiny(steps=STEPS, save_every=2, log_every=1, on_save_error=on_save_error)
    write_seal = saving.write_seal

    def disk_full(steps, seal, ahead, **options):
        if seal.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_seal(steps, seal, ahead, **options)

    monkeypatch.setattr(saving, "write_seal", disk_full)
    # Each step waits until it is known how the save has ended.
    check = Checkpointer.check

    def checked_when_known(self):
        if self._saver._sealing is not None:
            self._saver._sealing.join()
        check(self)

    monkeypatch.setattr(Checkpointer, "check", checked_when_known)
    directory = run_directory(config) / "checkpoints"
    if on_save_error == "raise":
        with pytest.raises(SaveError, match=r"step 4: not saved in .*No space left.*are free; saved there: steps 2"):
            train(config)
    else:
        assert int(train(config).state.step) == STEPS
    assert max(losses(config)) == last
    assert Checkpointer(directory).all_steps() == ([2] if on_save_error == "raise" else [8, 9])
    assert not (directory / "4").exists()


def test_tokens_that_are_no_bytes_have_no_bits_per_byte(tiny, tmp_path):
    for i in range(4):
        (np.arange(3000) % 11 + i).astype(np.uint16).tofile(tmp_path / f"{i}.bin")
    result = train(tiny(steps=0, data={"files": None, "tokens": f"{tmp_path}/*.bin"}))
    assert result.eval.bits_per_byte is None
    assert "bits per token" in result.summary()


# The command, but that no step is done before the test is through, however fast it compiles.
HELD = """
import sys, time
from shardadam.cli import main
from shardadam.trainer import loop
make_train_step = loop.make_train_step
def make_held_step(*args):
    train_step = make_train_step(*args)
    return lambda *args: (train_step(*args), time.sleep(250))[0]
loop.make_train_step = make_held_step
sys.exit(main(sys.argv[1:]))
"""


class TestSignals:
    """In a process of its own, as a user's shell would run it."""

    def start(self, tmp_path, config, program=("-m", "shardadam.cli")):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(asdict(config)))
        environment = os.environ | {
            "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, *program, "train", str(path)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read_until(self, process, text):
        lines = []
        for line in process.stderr:
            lines.append(line)
            if text in line:
                return
        raise AssertionError("".join(lines))

    def test_the_first_saves_and_the_run_goes_on_from_there(self, tmp_path, tiny):
        config = tiny(steps=10**6, log_every=1)
        process = self.start(tmp_path, config)
        self.read_until(process, "step 3/")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert "SIGTERM: finishing the step, then saving" in err
        step = int(out.split("stopped at step ")[1].split(",")[0])
        assert "saved; run again to go on" in out
        assert (run_directory(config) / "checkpoints" / str(step)).is_dir()
        resumed = train(replace(config, steps=step + 1))
        assert int(resumed.state.step) == step + 1
        whole = train(replace(config, steps=step + 1, name="whole"))
        assert_same_bits(resumed.state, whole.state)

    def test_the_second_ends_it_at_once(self, tmp_path, tiny):
        config = tiny(steps=10**6, model={"num_layers": 4, "d_model": 64, "d_ff": 256})
        process = self.start(tmp_path, config, ("-c", HELD))
        self.read_until(process, "parameters on")  # compiling now, which Python's own handlers would wait for
        process.send_signal(signal.SIGINT)
        self.read_until(process, "SIGINT: finishing the step, then saving")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "SIGTERM again: stopping at once" in err


def test_evaluation_is_deterministic_and_weighs_every_token_once(uninterrupted):
    config, whole = uninterrupted
    from shardadam.trainer.corpus import load_corpus

    corpus = load_corpus(config.data, vocab_size=384, window=17)
    scored = [evaluate(whole.state, corpus, replace(config, batch_size=size)) for size in (8, 16)]
    assert scored[0] == whole.eval
    assert scored[1].loss == pytest.approx(scored[0].loss, rel=1e-6)
    assert json.loads((run_directory(config) / "run.json").read_text())["data_sha256"] == corpus.sha256
