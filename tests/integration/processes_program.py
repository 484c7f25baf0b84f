"""What every process of a test runs: both ways to use the library, and a checkpoint from another process count.

`python processes_program.py OUT READ WRITE`: restores the state in READ, saves its own to WRITE, and process 0 writes
all results, gathered, to OUT.
"""

import errno
import resource
import socket
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from trees import by_path, flip_a_bit, random_tree

import shardadam
from shardadam import runtime
from shardadam.checkpoint import CheckpointError, NotFiniteError, SaveError, saving
from shardadam.checkpoint.shared import check_shared
from shardadam.checkpoint.steps import Steps
from shardadam.sharding import named_sharding

SHAPES = {"kernel": (64, 48), "odd": (17, 257), "bias": (1300,), "tiny": (7,)}  # natural, packed, packed, whole
NUM_STEPS = 3


def draw(seed):
    return random_tree(seed, shapes=SHAPES)


def everywhere(tree, mesh, spec=P()):
    """Host arrays that every process has in full -> on the mesh."""
    shardings = jax.tree.map(lambda x: named_sharding(mesh, spec, x.ndim), tree)
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: x[at]), tree, shardings)


def on_host(tree, mesh):
    """All of a tree in every process, which only a collective can do."""
    gathered = jax.jit(lambda t: t, out_shardings=jax.tree.map(lambda x: named_sharding(mesh, P(), x.ndim), tree))(tree)
    return jax.tree.map(np.asarray, gathered)


def loss_fn(params, batch):
    return sum(jnp.mean((batch[:, :1] - x.ravel()[:8]) ** 2) for x in jax.tree.leaves(params))


def drop_in(mesh):
    """`shardadam.adam` within a user's own jit, with gradients that are given: equal to the bit for any processes."""
    params = everywhere(draw(0), mesh)
    tx = shardadam.adam(1e-2, plan=shardadam.make_plan(params, mesh, min_size=100))
    opt_state = tx.init(params)
    shardadam.audit(opt_state, tx.plan_of(params))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for seed in range(1, NUM_STEPS + 1):
        params, opt_state = step(params, opt_state, everywhere(draw(seed), mesh))
    assert step._cache_size() == 1
    return params, opt_state


def new_state(mesh, seed=0):
    params = everywhere(draw(seed), mesh)
    plan = shardadam.make_plan(params, mesh, min_size=100)
    tx = shardadam.adamw(1e-2, weight_decay=0.1, plan=plan)
    return shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan)


@partial(jax.jit, donate_argnums=0)
def train_step(state, grads):
    return state.apply_gradients(grads=grads)


@jax.jit
def grads_of(params, batch):
    return jax.grad(loss_fn)(params, batch)


def trained(mesh):
    """`shardadam.TrainState`: with gradients that are given, and with those of a batch that the processes share out."""
    given, summed = new_state(mesh), new_state(mesh)
    for seed in range(1, NUM_STEPS + 1):
        given = train_step(given, everywhere(draw(seed), mesh))
        batch = np.random.default_rng(seed).standard_normal((16, 4)).astype(np.float32)
        summed = train_step(summed, grads_of(summed.params, everywhere(batch, mesh, P("data"))))
    shardadam.audit(given, given.plan)
    return given, summed


def results(mesh, read, write):
    """Everything, on the host; keyed by keypath, and the mu and nu of packed leaves as the checkpoint has them."""
    params, opt_state = drop_in(mesh)
    given, summed = trained(mesh)
    with shardadam.Checkpointer(write) as checkpointer:
        checkpointer.save(int(given.step), given, extra={"processes": jax.process_count()})
        checkpointer.wait()
        assert checkpointer.latest_step() == NUM_STEPS
    with shardadam.Checkpointer(read) as checkpointer:
        restored = checkpointer.restore(new_state(mesh, seed=9))
    shardadam.audit(restored, restored.plan)
    everything = {"params": params, "opt_state": opt_state, "given": given, "summed": summed, "restored": restored}
    return by_path(on_host(everything, mesh))


def one_directory_one_writer(directory):
    """A directory that is not shared, and one that another run holds, are told to every process."""
    apart = Path(f"{directory}-{jax.process_index()}")
    apart.mkdir()
    with pytest.raises(CheckpointError) as caught:
        check_shared(apart, seconds=0.5)
    assert f"process 1 (host {socket.gethostname()}, {directory}-1)" in str(caught.value)
    check_shared(Path(directory))
    with shardadam.Checkpointer(directory) as first, shardadam.Checkpointer(directory) as second:
        first.lock()
        with pytest.raises(CheckpointError, match="another Checkpointer of this process writes there"):
            second.lock()


def a_device_of_the_last_process(state):
    """One flipped bit in one process's device is told to every process; so are numbers that differ."""
    device = jax.devices()[-1]
    shardadam.check_replicas((state, {"step": np.int64(7), "seed": 3}))
    wrong = state.replace(params=state.params | {"odd": flip_a_bit(state.params["odd"], device.id)})
    told = f"`params/odd`: device {device.id} \\(process {jax.process_count() - 1}\\) of 8 copies not as most"
    with pytest.raises(shardadam.DivergenceError, match=told):
        shardadam.check_replicas(wrong)
    with pytest.raises(shardadam.DivergenceError, match=r"`step`: process 0(, process 1)? of "):
        shardadam.check_replicas({"step": jax.process_index() == 0})


def a_disk_that_is_full(directory, state):
    """What fails in one process is told to all, and all save again, in step with one another."""
    with shardadam.Checkpointer(directory) as checkpointer, pytest.MonkeyPatch.context() as patch:
        checkpointer.save(1, state, wait=True)
        if jax.process_index() == 0:
            patch.setattr(Steps, "write_seal", no_space)
        with pytest.raises(SaveError, match=r"step 2: not saved in .*No space left.*; saved there: steps 1"):
            checkpointer.save(2, state, wait=True)
        patch.undo()
        checkpointer.save(3, state, wait=True)
        assert checkpointer.all_steps() == [1, 3]


def a_process_that_can_write_no_more(directory, state):
    """The last process is over a limit: the save ends in all at once, with what it had, and all save again."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with shardadam.Checkpointer(directory) as checkpointer:
        checkpointer.save(1, state, wait=True)
        if jax.process_index() == jax.process_count() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        try:
            with pytest.raises(
                SaveError, match=r"step 2: not saved in .*File too large .*saved there: steps 1"
            ) as caught:
                checkpointer.save(2, state, wait=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert caught.value.errno == errno.EFBIG
        checkpointer.save(3, state, wait=True)
        assert checkpointer.all_steps() == [1, 3]


def a_process_that_cannot_begin(directory, state, process, on_error):
    """One process has no room for a copy: the save ends in all at once, and all save again."""

    def no_room(*_, **__):
        raise MemoryError("no room for a copy")

    told = r"step \d: not saved in .*MemoryError: no room for a copy"
    with shardadam.Checkpointer(directory, on_error=on_error) as checkpointer:
        for step, module, name in ((1, ocp.PyTreeCheckpointHandler, "async_save"), (3, saving, "sliced")):
            with pytest.MonkeyPatch.context() as patch:
                if jax.process_index() == process:
                    patch.setattr(module, name, no_room)
                start = time.monotonic()
                with nullcontext() if on_error == "warn" else pytest.raises(SaveError, match=told):
                    checkpointer.save(step, state, extra={"batch": step})
                assert time.monotonic() - start < 100  # Nobody waited for what does not come: 600 s, or for ever.
            checkpointer.save(step + 1, state, extra={"batch": step + 1}, wait=True)
        assert checkpointer.all_steps() == [2, 4]


def a_directory_that_cannot_be_made(directory, state):
    """Process 0 finds it before Orbax does, with which the others would wait."""
    in_the_way = Path(directory, "2.orbax-checkpoint-tmp")
    with shardadam.Checkpointer(directory) as checkpointer:
        checkpointer.save(1, state, wait=True)
        if jax.process_index() == 0:
            in_the_way.write_text("a file")
        with pytest.raises(SaveError, match=r"step 2: not saved in .*File exists .*saved there: steps 1"):
            checkpointer.save(2, state)
        if jax.process_index() == 0:
            in_the_way.unlink()
        checkpointer.save(3, state, wait=True)
        assert checkpointer.all_steps() == [1, 3]


def keys_that_each_process_has_for_itself(directory, mesh):
    """As `jax.random.key` makes them: Orbax saves no arrays that only one process knows."""
    state = {
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8), 3),
        "x": everywhere(np.ones(3), mesh),
    }
    with shardadam.Checkpointer(directory) as checkpointer:
        checkpointer.save(1, state, wait=True)
        restored = checkpointer.restore(state | {"key": jax.random.key(0)}, verify="full")
        assert checkpointer.damaged == []
    assert not restored["key"].committed
    for name in ("key", "keys"):
        assert restored[name].dtype == state[name].dtype
        np.testing.assert_array_equal(*(jax.random.key_data(tree[name]) for tree in (restored, state)))


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def damage_is_found_by_all(directory, mesh):
    """Each process hashes other files; all hear of the one that is damaged, and restore the same older step."""
    state = new_state(mesh)
    with shardadam.Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state.replace(step=state.step * 0 + step))
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]
        if jax.process_index() == 0:
            path = max(Path(directory, "2", "state").rglob("d/*"), key=lambda path: path.stat().st_size)
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        runtime.from_process_zero("damaged", "")
        with pytest.raises(CheckpointError, match="its bytes are not those that were sealed"):
            checkpointer.restore(state, 2)
        restored = checkpointer.restore(new_state(mesh, seed=9), verify="full")
        assert int(restored.step.addressable_data(0)) == checkpointer.restored_step == 1
        assert [damage.step for damage in checkpointer.damaged] == [2]
        checkpointer.save(2, restored, wait=True)
        assert checkpointer.latest_step() == 2
        bad = restored.replace(params=jax.tree.map(lambda x: x * jnp.nan, restored.params))
        with pytest.raises(NotFiniteError, match="elements that are NaN or infinite"):
            checkpointer.save(3, bad, wait=True)
        assert checkpointer.all_steps() == [1, 2]


if __name__ == "__main__":
    out, read, write = sys.argv[1:]
    num_processes = runtime.initialize(heartbeat_seconds=30)
    assert num_processes == jax.process_count() > 1
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    found = results(mesh, read, write)
    a_device_of_the_last_process(new_state(mesh))
    small = {"x": everywhere(np.arange(2**12, dtype=np.float32), mesh, P("data"))}
    a_disk_that_is_full(f"{write}-full", small)
    a_process_that_can_write_no_more(f"{write}-limit", small)
    a_process_that_cannot_begin(f"{write}-first", new_state(mesh), 0, "raise")
    a_process_that_cannot_begin(f"{write}-last", small, num_processes - 1, "warn")
    a_directory_that_cannot_be_made(f"{write}-directory", small)
    assert runtime.from_process_zero("index", str(jax.process_index())) == "0"
    one_directory_one_writer(write)
    damage_is_found_by_all(f"{write}-damaged", mesh)
    keys_that_each_process_has_for_itself(f"{write}-keys", mesh)
    if jax.process_index() == 0:
        np.savez(out, **found)
