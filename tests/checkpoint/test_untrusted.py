"""Nothing runs from a checkpoint, nothing outside of it is read, nothing is allocated that its seal does not tell."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from shardadam.checkpoint import Checkpointer, CheckpointError, seal
from shardadam.checkpoint.seal import Seal, SealedFile
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.verify import stored_leaf_faults

LIKE = {"x": jnp.arange(64.0).reshape(8, 8), "y": jnp.ones(3)}
_heard = None  # An audit hook stays for the process's life: it listens only while this is a list.


def _listen(event, args):
    if _heard is not None and event in ("pickle.find_class", "os.exec", "os.system", "subprocess.Popen"):
        _heard.append((event, args))


sys.addaudithook(_listen)


@pytest.fixture
def heard(monkeypatch):
    events = []
    monkeypatch.setattr(sys.modules[__name__], "_heard", events)
    return events


@pytest.fixture
def saved(tmp_path):
    root = tmp_path / "checkpoints"
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, LIKE, extra={"a": 1}, wait=True)
        checkpointer.save(2, LIKE, extra={"a": 2})
    return root


class Bomb:
    """What a pickle could do."""

    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_nothing_is_unpickled(saved, heard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer(saved) as checkpointer:
        checkpointer.save(3, LIKE, wait=True)
        checkpointer.restore(LIKE, verify="full")
        text = pickle.dumps(Bomb())
        for name in ("metadata", "state.pkl", "array_metadatas", "_sharding", "checkpoint"):
            for place in (saved, saved / "3", saved / "3" / "state", saved / "3" / "extra"):
                place.mkdir(exist_ok=True)
                if not (place / name).is_dir():
                    (place / name).write_bytes(text)
        with contextlib.suppress(ValueError):  # Orbax may stumble over what is in place of its own files.
            checkpointer.restore(LIKE, 3, verify=False)
        with pytest.raises(CheckpointError, match="was not there when the step was sealed"):
            checkpointer.restore(LIKE, 3)
        checkpointer.restore(LIKE)
        assert checkpointer.restored_step == 2
    assert heard == []
    assert not (tmp_path / "was-run").exists()
    pickle.loads(text)  # And the hook does hear.
    assert heard[0][0] == "pickle.find_class"


@pytest.mark.parametrize("what", ["step", "item", "file", "data"])
def test_symbolic_links_are_refused_whether_verified_or_not(saved, tmp_path, what):
    step = saved / "2"
    path = {"step": step, "item": step / "state", "file": step / "extra" / "metadata", "data": step / "state" / "d"}[
        what
    ]
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with Checkpointer(saved) as checkpointer:
        for check in (False, "files", "full"):
            with pytest.raises(CheckpointError, match="symbolic link"):
                checkpointer.restore(LIKE, 2, verify=check)
        checkpointer.restore(LIKE)
        assert checkpointer.restored_step == 1
        assert "symbolic link" in checkpointer.damaged[0].why
    assert (tmp_path / "outside").exists()  # The link was moved, not what it leads to.


@pytest.mark.parametrize("folder", ["seals", "damaged", "trash"])
def test_a_link_in_place_of_our_own_directories_leads_nowhere(saved, tmp_path, folder):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "9.json").write_text("mine")
    shutil.rmtree(saved / folder, ignore_errors=True)
    (saved / folder).symlink_to(precious)
    if folder == "damaged":
        (saved / "2" / "commit_success.txt").unlink()
    with Checkpointer(saved, max_to_keep=2) as checkpointer:
        if folder == "damaged":
            checkpointer.restore(LIKE)
            assert checkpointer.damaged[0].moved_to is None
        else:
            with pytest.raises(CheckpointError, match=f"{folder}: is a symbolic link"):
                checkpointer.save(5, LIKE, wait=True)
    assert [path.name for path in precious.iterdir()] == ["9.json"]


@pytest.mark.parametrize("what", ["link", "device", "pipe", "directory", "large"])
def test_a_seal_that_leads_elsewhere_or_never_ends_is_refused(saved, tmp_path, what):
    seal = saved / "seals/2.json"
    kept = seal.rename(tmp_path / "elsewhere.json")
    if what == "pipe":
        os.mkfifo(seal)
    elif what == "directory":
        seal.mkdir()
    elif what == "large":
        with seal.open("wb") as file:
            file.truncate(2**40)
    else:
        seal.symlink_to(kept if what == "link" else "/dev/zero")
    with Checkpointer(saved) as checkpointer:
        checkpointer.restore(LIKE, verify="full")
        assert checkpointer.restored_step == 1
        assert "no regular file" in checkpointer.damaged[0].why
    assert kept.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: {},
        lambda body: [],
        lambda body: None,
        lambda body: body | {"files": None},
        lambda body: body | {"files": {"x": None}},
        lambda body: body | {"files": {name: file | {"size": "1"} for name, file in body["files"].items()}},
        lambda body: body | {"leaves": {name: leaf | {"shape": 3} for name, leaf in body["leaves"].items()}},
        lambda body: body | {"leaves": {name: leaf | {"shape": "ab"} for name, leaf in body["leaves"].items()}},
        lambda body: body | {"run_id": 5},
        lambda body: body | {"surprise": 1},
    ],
)
def test_a_seal_with_a_right_checksum_and_wrong_fields_is_damage(saved, change):
    path = saved / "seals/2.json"
    path.write_text(seal._signed(change(json.loads(path.read_text())["seal"]), seal.FORMAT))
    with Checkpointer(saved) as checkpointer:
        checkpointer.restore(LIKE)
        assert checkpointer.restored_step == 1
    assert "the seal is none of ours" in checkpointer.damaged[0].why


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "state/../../../secret", "..", ""])
def test_paths_of_a_seal_that_lead_outside_are_never_opened(saved, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    steps = Steps(Checkpointer(saved).directory)
    seal = steps.read_seal(2)
    files = {**seal.files, name: SealedFile(6, "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b")}
    steps.write_seal(Seal(step=2, files=files, leaves=seal.leaves))
    with Checkpointer(saved) as checkpointer, pytest.raises(CheckpointError) as caught:
        checkpointer.restore(LIKE, 2)
    assert str(caught.value) == f"{name}: is not there"


def rewritten(saved, **fields):
    """Step 2 with another description of how `x` is stored, and with a seal that says that these are its files."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{saved}/2/state/"}).result()
    described = json.loads(store.read(b"x/.zarray").result().value) | fields
    store.write(b"x/.zarray", json.dumps(described).encode()).result()
    return resealed(saved)


def resealed(saved):
    from shardadam.checkpoint.hashing import hash_file
    from shardadam.checkpoint.sealing import list_files

    steps = Steps(Checkpointer(saved).directory)
    files = {name: hash_file(steps.path(2) / name) for name in list_files(steps.path(2))}
    seal = Seal(step=2, files=files, leaves=steps.read_seal(2).leaves)
    steps.write_seal(seal)
    return steps.path(2), seal


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [2**40, 8]}, r"`x`: is float32\[1099511627776, 8\], sealed as float32\[8, 8\]"),
        ({"chunks": [2**16, 2**14]}, r"`x`: has chunks of shape \(65536, 16384\), and itself \(8, 8\)"),
        ({"dtype": "<c16"}, r"`x`: is complex128\[8, 8\], sealed as float32\[8, 8\]"),
    ],
)
def test_shapes_larger_than_their_seal_says_are_refused_before_anything_is_allocated(saved, fields, message):
    path, seal = rewritten(saved, **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [fault[:3] for fault in stored_leaf_faults(path, seal)] == ["`x`"]
    with Checkpointer(saved) as checkpointer:
        with pytest.raises(CheckpointError, match=message):
            checkpointer.restore(LIKE, 2)
        with pytest.raises(CheckpointError, match=r"`x`: (got|has)"):  # By the state wanted, where there is no seal.
            checkpointer.restore(LIKE, 2, verify=False)
        checkpointer.restore(LIKE)
        assert checkpointer.restored_step == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


# Orbax leaves a coroutine behind where a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_chunk_that_decompresses_to_more_than_it_is_stops_there(saved, tmp_path):
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/large/"},
        "metadata": {"shape": [2**26], "chunks": [2**26], "dtype": "<f4", "compressor": {"id": "zstd", "level": 1}},
        "store_data_equal_to_fill_value": True,
    }
    ts.open(spec, create=True).result().write(np.zeros(2**26, np.float32)).result()
    bomb = (tmp_path / "large" / "0").read_bytes()
    assert len(bomb) < 2**20 < 2**28
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{saved}/2/state/"}).result()
    store.write(b"x/0.0", bomb).result()
    resealed(saved)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Checkpointer(saved) as checkpointer, pytest.raises(ValueError, match="End of data expected"):
        checkpointer.restore(LIKE, 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
