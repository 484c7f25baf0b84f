"""What looks like damage and is none: a step that may not be read, is deleted meanwhile, or was sealed just now."""

import jax.numpy as jnp
import pytest
from conftest import no_root

from shardadam.checkpoint import Checkpointer, reading, restoring
from shardadam.checkpoint.steps import Steps


def state(value):
    return {"x": jnp.full((8, 4), value, jnp.float32)}


@pytest.mark.parametrize("what", ["a file of it", "its seal"])
def test_a_step_that_may_not_be_read_is_left_where_it_is(open_place, what):
    with Checkpointer(open_place) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), wait=True)
        closed = open_place / "seals/2.json" if what == "its seal" else next(open_place.glob("2/**/manifest.ocdbt"))
        closed.chmod(0)
        with no_root(), pytest.raises(PermissionError) as caught:
            checkpointer.restore(state(0))
        assert "Step 2 of" in caught.value.__notes__[-1]
        assert "nothing was moved" in caught.value.__notes__[-1]
        assert not (open_place / "damaged").exists()
        closed.chmod(0o600)
        assert checkpointer.restore(state(0))["x"][0, 0] == 2


def test_a_step_that_its_run_deletes_while_it_is_read_is_passed_over(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, max_to_keep=2) as writer, Checkpointer(tmp_path) as reader:
        for step in (1, 2):
            writer.save(step, state(step), wait=True)
        read = reading.read_state

        def while_others_save(*args):
            monkeypatch.undo()
            for step in (3, 4):
                writer.save(step, state(step), wait=True)
            writer.save(5, state(5), wait=True)  # Begun only when what 4 made superfluous has been removed.
            return read(*args)

        monkeypatch.setattr(reading, "read_state", while_others_save)
        assert reader.restore(state(0))["x"][0, 0] == 5
        assert reader.damaged == []


def test_a_step_that_is_sealed_while_steps_are_listed_is_not_lost(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as writer, Checkpointer(tmp_path) as reader:
        writer.save(1, state(1), wait=True)
        seals = Steps.seals

        def and_another(steps):
            found = seals(steps)
            monkeypatch.undo()
            writer.save(2, state(2), wait=True)
            return found

        monkeypatch.setattr(Steps, "seals", and_another)
        newest = restoring._newest(Steps(reader.directory), without=[])
        assert newest == (1, False)
        assert reader.restore(state(0))["x"][0, 0] == 2
        assert reader.damaged == []
