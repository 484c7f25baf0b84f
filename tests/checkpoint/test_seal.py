"""What a seal says, when a step counts as saved, and that nothing about a seal can change unseen."""

import dataclasses
import hashlib
import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_save_faults import at_the_next_step

import shardadam
from shardadam.checkpoint import Checkpointer, CheckpointError, NotFiniteError, saving, sealing
from shardadam.checkpoint.digest import host_digest
from shardadam.checkpoint.seal import Seal, SealedFile, SealedLeaf
from shardadam.checkpoint.steps import Steps


def train_state(num_devices=8, layout="packed"):
    mesh = make_mesh({"data": num_devices})
    params = {
        name: jax.device_put(jnp.arange(size, dtype=jnp.float32).reshape(shape), NamedSharding(mesh, P()))
        for name, size, shape in (("kernel", 221, (17, 13)), ("bias", 7, (7,)))
    }
    tx = shardadam.adam(1e-2, plan=shardadam.make_plan(params, mesh, layout=layout, min_size=0))
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=tx.plan_of(params))
    return jax.jit(lambda s: s.apply_gradients(grads=s.params))(state)


def test_what_it_says(tmp_path):
    state = train_state()
    with Checkpointer(tmp_path, run_id="the-run", config={"seed": 3}) as checkpointer:
        checkpointer.save(7, state, extra={"a": 1})
    seal = Steps(checkpointer.directory).read_seal(7)
    files = {str(p.relative_to(tmp_path / "7")): p for p in (tmp_path / "7").rglob("*") if p.is_file()}
    assert {name: (f.size, f.sha256) for name, f in seal.files.items()} == {
        name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in files.items()
    }
    assert (seal.step, seal.count, seal.run_id, seal.config) == (7, 1, "the-run", {"seed": 3})
    assert (seal.origin, seal.num_processes, seal.num_nonfinite) == ("saved", 1, 0)
    assert seal.versions["jax"] == jax.__version__
    assert seal.plan["mesh"] == {"data": 8}
    assert seal.plan["leaves"]["kernel"]["layout"] == "packed"
    # Digests are those of the logical arrays, and so are shapes: (17, 13) lies as one row of 1024 in memory.
    kernel = seal.leaves["params/kernel"]
    assert kernel == SealedLeaf(host_digest(state.params["kernel"], "params/kernel").text, 0, (17, 13), "float32")
    assert seal.leaves["opt_state/0/mu/kernel"].shape == (17, 13)
    with Checkpointer(tmp_path / "other") as other:
        other.save(1, train_state(5, "natural"))
    assert Steps(other.directory).read_seal(1).leaves == seal.leaves


def test_a_step_is_saved_once_it_is_sealed_and_without_being_waited_for(tmp_path, monkeypatch):
    gate, write = threading.Event(), sealing.write_seal
    monkeypatch.setattr(
        "shardadam.checkpoint.saving.write_seal", lambda *args, **options: gate.wait(200) and write(*args, **options)
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)})
        deadline = time.monotonic() + 200
        while ocp.utils.checkpoint_steps(tmp_path) != [1]:
            assert time.monotonic() < deadline
        assert checkpointer.latest_step() is None
        gate.set()
        while checkpointer.latest_step() is None:
            assert time.monotonic() < deadline
        assert checkpointer.all_steps() == [1]


def test_what_goes_wrong_in_sealing_is_raised_and_the_step_is_not_saved(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(Steps, "write_seal", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left") as caught:
                checkpointer.save(2, {"x": jnp.ones(3)}, wait=True)
        assert "step 2: not saved" in str(caught.value)
        assert checkpointer.all_steps() == [1]
        assert not (tmp_path / "2").exists()  # What Orbax had committed takes no space on a disk that is full.
        checkpointer.save(2, {"x": jnp.full(3, 2.0)}, wait=True)
        assert checkpointer.restore({"x": jnp.ones(3)})["x"][0] == 2


def test_what_a_killed_run_has_committed_and_not_sealed_is_out_of_the_way_and_not_lost(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, {"x": jnp.ones(3)}, wait=True)
    (tmp_path / "seals" / "2.json").unlink()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, {"x": jnp.full(3, 2.0)}, wait=True)
        assert checkpointer.restore({"x": jnp.ones(3)})["x"][0] == 2
    (why,) = (tmp_path / "damaged").glob("2-*.txt")
    assert "it has no seal" in why.read_text()
    assert (why.with_suffix("") / "state").is_dir()


@pytest.mark.parametrize(("value", "on_error"), [(np.nan, "raise"), (np.inf, "raise"), (-np.inf, "warn")])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value, on_error):
    good, bad = ({"params": {"w": jnp.array([1.0, x, x])}, "step": 3} for x in (0.5, value))
    refused = r"^step 3: not saved: 1 of 2 leaves .*: `params/w` \(2\);.*nonfinite=T"
    with Checkpointer(tmp_path, max_to_keep=2, on_error=on_error) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, good)
        checkpointer.save(3, bad)
        with pytest.raises(NotFiniteError, match=refused):
            at_the_next_step(checkpointer)
        checkpointer.check()  # Told once.
        # Nothing is left of it, and no good step went for it.
        assert checkpointer.all_steps() == sorted(ocp.utils.checkpoint_steps(tmp_path)) == [1, 2]
        with pytest.raises(NotFiniteError, match=refused):
            checkpointer.save(3, bad, wait=True)
        checkpointer.save(3, bad)
        with pytest.raises(NotFiniteError, match=refused):
            checkpointer.save(4, good)
        checkpointer.save(4, bad, allow_nonfinite=True)
    assert Steps(checkpointer.directory).read_seal(4).num_nonfinite == 2
    with pytest.raises(NotFiniteError, match=refused), Checkpointer(tmp_path / "other", on_error=on_error) as closed:
        closed.save(3, bad)


def test_a_seal_is_of_what_was_saved_though_it_is_donated_at_once(tmp_path):
    """Digests are waited for in the background, while the next steps take the memory of what they are of."""
    state = train_state()
    step = jax.jit(lambda s: s.apply_gradients(grads=s.params), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        for number in (1, 2, 3):
            wanted = np.array(jnp.copy(state.params["kernel"]))
            checkpointer.save(number, state)
            before, state = state, step(step(state))
            assert before.opt_state[0].mu["kernel"].is_deleted()
            checkpointer.wait()
            sealed = Steps(checkpointer.directory).read_seal(number).leaves["params/kernel"].digest
            assert sealed == host_digest(wanted, "params/kernel").text
            checkpointer.restore(state, verify="full")  # mu and nu as Orbax has written them.
            assert checkpointer.restored_step == number


def test_every_bit_of_a_seal_counts():
    seal = Seal(
        step=3,
        files={"state/d/a": SealedFile(10, "ab" * 32)},
        leaves={"x": SealedLeaf("0" * 16, 0, (2, 3), "float32")},
        config={"text": "ü", "rate": 1e-3, "none": None},
    )
    raw = seal.to_text().encode()
    assert Seal.from_text(raw.decode()) == seal
    assert seal.leaves["x"].nbytes == 24
    for i in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(CheckpointError, match=r"the seal (is damaged|has format)"):
            Seal.from_text(flipped.decode(errors="replace"))
    for cut in (0, 1, len(raw) // 2, len(raw) - 1):
        with pytest.raises(CheckpointError, match="the seal is damaged"):
            Seal.from_text(raw[:cut].decode(errors="replace"))
    for text in ("[]", "{}", "null", '{"seal": 1, "format": 1}', "[" * 10000):
        with pytest.raises(CheckpointError, match="the seal is damaged"):
            Seal.from_text(text)


def test_a_seal_of_a_newer_format_asks_for_an_upgrade(monkeypatch):
    monkeypatch.setattr("shardadam.checkpoint.seal.FORMAT", 2)
    text = Seal(step=1, files={}, leaves={}).to_text()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, wanted 1: upgrade"):
        Seal.from_text(text)


def test_the_format_does_not_change():
    seal = Seal(step=1, files={"f": SealedFile(1, "00")}, leaves={"x": SealedLeaf("11", 0, (2,), "int8")}, run_id="r")
    assert json.loads(seal.to_text())["sha256"] == "7f16666e9a215c146a64cc0c1792dad7d34499bfc089c7347886646494103b00"
    assert dataclasses.asdict(seal)["leaves"]["x"].shape == (2,)


def test_adopting_a_step_of_plain_orbax_or_an_older_version(tmp_path):
    state = train_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, state)
    saved = Steps(checkpointer.directory).read_seal(4)
    (tmp_path / "seals" / "4.json").unlink()
    (tmp_path / "seals").rmdir()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(CheckpointError, match=r"step 3: not saved: .* holds steps 4 of plain Orbax"):
            checkpointer.save(3, state)
        restored = checkpointer.restore(state, verify=False)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        with pytest.raises(CheckpointError, match=r"step 5: is not committed in .*; without a seal: \[4\]"):
            checkpointer.adopt(5)
        checkpointer.adopt(4)
        assert checkpointer.all_steps() == [4]
        with pytest.raises(CheckpointError, match="step 4: is sealed already"):
            checkpointer.adopt(4)
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(state, verify="full"), state)
    adopted = Steps(checkpointer.directory).read_seal(4)
    assert adopted.origin == "adopted"
    assert (adopted.leaves, adopted.files, adopted.count) == (saved.leaves, saved.files, saved.count)


def test_a_step_is_adopted_when_the_save_before_has_tidied_up(tmp_path, monkeypatch):
    """Which removes drafts of seals: a save that was killed may have left them."""
    drafted, swept, remove_retired, replace = threading.Event(), threading.Event(), saving.remove_retired, os.replace

    def sweeps_when_there_is_a_draft(steps):
        drafted.wait(1)
        remove_retired(steps)
        swept.set()

    def replaces_when_drafts_are_swept(*args):
        drafted.set()
        swept.wait(1)
        replace(*args)

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(saving, "remove_retired", sweeps_when_there_is_a_draft)
        checkpointer.save(1, {"x": jnp.ones(3)}, wait=True)
        (tmp_path / "seals" / "1.json").unlink()
        monkeypatch.setattr(os, "replace", replaces_when_drafts_are_swept)
        checkpointer.adopt(1)
        assert checkpointer.all_steps() == [1]
