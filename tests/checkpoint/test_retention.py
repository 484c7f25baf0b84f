"""Which steps are kept, and that a kill in the middle of a deletion, or at any time in a save, leaves no half step."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_seal import train_state

from shardadam.checkpoint import Checkpointer
from shardadam.checkpoint.steps import Steps

HERE = Path(__file__).parent


def state_of(step):
    return {"x": jnp.full((8, 4), step, jnp.float32)}


def started(program, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE.parents[1]), str(HERE.parent), str(HERE)))}
    command = [sys.executable, "-u", *program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_last_ones_and_the_periodic_ones_are_kept(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2, keep_period=4) as checkpointer:
        for step in range(10):
            checkpointer.save(step, state_of(step))
    assert checkpointer.all_steps() == [0, 4, 8, 9]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "4", "8", "9", "seals", "trash"}
    assert {path.name for path in (tmp_path / "seals").iterdir()} == {f"{step}.json" for step in (0, 4, 8, 9)}
    assert list((tmp_path / "trash").iterdir()) == []
    for step in (0, 4, 8, 9):
        assert checkpointer.restore(state_of(0), step, verify="full")["x"][0, 0] == step


def test_what_cannot_be_deleted_is_told_and_the_new_step_is_saved(tmp_path, monkeypatch, caplog):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_of(step), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(
                "shardadam.checkpoint.steps.shutil.rmtree", lambda path: (_ for _ in ()).throw(OSError("busy"))
            )
            checkpointer.save(3, state_of(3), wait=True)
            assert checkpointer.all_steps() == [2, 3]
            checkpointer._saver.tidied()
        assert f"what is left of deleted steps in {tmp_path} cannot be removed: busy" in caplog.text
        assert len(list((tmp_path / "trash").iterdir())) == 2  # Step 1, and its seal.
        checkpointer.save(4, state_of(4), wait=True)
    assert checkpointer.all_steps() == [3, 4]
    assert list((tmp_path / "trash").iterdir()) == []


def test_killed_at_every_moment_of_a_deletion_a_sealing_and_a_moving_aside(tmp_path):
    with Checkpointer(tmp_path / "clean") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state_of(step))
    out, err = (program := started([HERE / "kills.py"], tmp_path / "clean", tmp_path)).communicate(timeout=120)
    assert program.returncode == 0, err
    moments = dict(re.findall(r"(\w[\w ]*): (\d+)", out))
    assert int(moments["delete"]) > 20  # Each file of the step is removed at a moment of its own.
    assert int(moments["set aside"]) >= 4
    assert int(moments["seal"]) >= 2


SAVES_FOR_EVER = """
import sys, conftest, itertools
from test_seal import train_state
from shardadam.checkpoint import Checkpointer
state = train_state()
with Checkpointer(sys.argv[1], max_to_keep=2) as checkpointer:
    if checkpointer.latest_step() is not None:
        state = checkpointer.restore(state, verify="full")
        assert checkpointer.damaged == [], checkpointer.damaged
    start = (checkpointer.latest_step() or 0) + 1
    print("from", start - 1)
    for step in itertools.count(start):
        checkpointer.save(step, state.replace(step=state.step * 0 + step))
        if step % 3 == 0:
            checkpointer.wait()
            print("saved", step)
"""


@pytest.mark.slow
def test_killed_at_random_moments_of_saving_what_was_saved_is_there(tmp_path):
    rng, acknowledged = random.Random(5), 0
    for _ in range(2):
        program = started(["-c", SAVES_FOR_EVER], tmp_path)
        lines = []
        while not (lines and lines[-1].startswith("saved")):
            lines.append(program.stdout.readline())
            assert lines[-1], program.stderr.read()
        time.sleep(rng.uniform(0, 0.4))
        program.send_signal(signal.SIGKILL)
        lines += program.communicate(timeout=60)[0].splitlines()
        found = int(lines[0].split()[1])
        assert found >= acknowledged
        acknowledged = max(int(line.split()[1]) for line in lines[1:] if re.fullmatch(r"saved \d+\s*", line))
    checkpointer = Checkpointer(tmp_path)
    like = train_state()
    restored = checkpointer.restore(jax.tree.map(jnp.zeros_like, like), verify="full")
    assert int(restored.step) == checkpointer.restored_step >= acknowledged
    assert (restored.params["kernel"] == like.params["kernel"]).all()
    assert checkpointer.damaged == []
    for step in checkpointer.all_steps():
        checkpointer.restore(like, step, verify="full")


@pytest.mark.parametrize("moment", ["sealed but listed", "renamed", "emptied"])
def test_a_deletion_that_was_cut_short_is_ended_by_the_next_save(tmp_path, moment):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state_of(step))
    steps, trash = Steps(checkpointer.directory), tmp_path / "trash"
    trash.mkdir()
    steps.seal_path(1).rename(trash / "1-abc.json")
    if moment != "sealed but listed":
        steps.path(1).rename(trash / "1-abc")
    if moment == "emptied":
        (trash / "1-abc" / "state" / "manifest.ocdbt").unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.all_steps() == [2, 3]
        checkpointer.save(4, state_of(4), wait=True)
        assert checkpointer.all_steps() == [2, 3, 4]
    assert not (tmp_path / "1").exists()
    assert list(trash.iterdir()) == []


def test_a_step_that_is_retired_while_others_are_removed_goes_the_next_time(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state_of(step))
    steps, empty = Steps(checkpointer.directory), Steps._empty

    def retires_another(self, record):
        monkeypatch.undo()
        empty(self, record)
        self.retire(2)

    monkeypatch.setattr(Steps, "_empty", retires_another)
    steps.retire(1)
    steps.sweep()
    assert steps.sealed() == [3]
    assert [path.name.partition("-")[0] for path in (tmp_path / "trash").glob("*.json")] == ["2"]
    steps.sweep()
    assert steps.unsealed() == list((tmp_path / "trash").iterdir()) == []


def test_a_step_whose_seal_cannot_be_read_stays_and_counts_for_none(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_of(step), wait=True)
        for step in (3, 4):
            checkpointer.save(step, state_of(step), wait=True)
            (tmp_path / "seals" / f"{step}.json").write_text("{")
        assert checkpointer.all_steps() == [2, 3, 4]
        checkpointer.save(5, state_of(5), wait=True)
        assert checkpointer.all_steps() == [2, 3, 4, 5]


def test_a_file_that_is_no_seal_counts_for_none(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_of(step), wait=True)
        for name in ("02", "\N{ARABIC-INDIC DIGIT TWO}", "+2", "2 "):
            shutil.copy(tmp_path / "seals" / "2.json", tmp_path / "seals" / f"{name}.json")
        assert checkpointer.all_steps() == [1, 2]
        checkpointer.save(3, state_of(3), wait=True)
        assert checkpointer.all_steps() == [2, 3]
