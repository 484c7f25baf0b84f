"""Eight simulated CPU devices, strict dtype promotion, warnings as errors: set before JAX starts its backend."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    # XLA aborts the process where a device comes 40 s late to a collective: as it may, where other processes have the
    # cores or the machine stands still.
    " --xla_cpu_collective_call_terminate_timeout_seconds=250"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
# XLA:CPU's thread pool has as many threads as there are devices or NPROC says: with eight, seven that wait in a
# collective leave one, and a device that needs two never arrives ("rendezvous ... termination timeout", an abort).
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from jax.sharding import AxisType, Mesh

# That drawing takes long says something of the machine, and of what else it does, and nothing of the code.
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


def make_mesh(sizes, axis_type=AxisType.Auto):
    """A Mesh over the first simulated devices: `make_mesh({"data": 4, "model": 2}, AxisType.Explicit)`."""
    shape = tuple(sizes.values())
    types = axis_type if isinstance(axis_type, tuple) else (axis_type,) * len(shape)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, tuple(sizes), axis_types=types)


@pytest.fixture(scope="session")
def data_mesh():
    return make_mesh({"data": 8})


@pytest.fixture
def standard_promotion():
    """For tests whose oracle is optax, whose float ** int cannot run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def open_place():
    """A directory that any user may go into, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="shardadam-test-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def no_root():
    """As another user than root, who may read and write all."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)
