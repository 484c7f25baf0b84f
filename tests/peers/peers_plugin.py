"""A pytest plugin that runs optax's own tests with shardadam's Adam, and writes what each test did as JSON.

In the environment: `PEERS_MODE` is one of `peers_swap.MODES`; `PEERS_PLAIN` keeps optax's own functions, on the
same mesh (`mesh`) or on one device (`alone`); `PEERS_OUT` is the file to write.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "32")

import jax
import pytest
from peers_swap import MODES, Record, Swap

# alias_test compares L-BFGS with scikit-learn; nothing of Adam's does. Without it the file could not be imported.
if importlib.util.find_spec("sklearn") is None:
    for name in ("sklearn", "sklearn.datasets", "sklearn.linear_model"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["sklearn"].datasets = sys.modules["sklearn.datasets"]
    sys.modules["sklearn"].linear_model = sys.modules["sklearn.linear_model"]

# sharding_test compares JAX's version as text and skips, as "0.10" is less than "0.7": it is shown one that sorts.
SORTS_AS_NEW = "0.9.99"


class Peers:
    """Runs every test under the mode's mesh, so that the arrays it makes live on the devices, and keeps its record."""

    def __init__(self, mode, plain, out):
        self.mesh = MODES[mode].mesh
        self.swap = Swap(MODES[mode], plain=plain)
        self.out = out
        self.jax_version = jax.__version__
        self.results = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.swap.record = Record()
        jax.__version__ = SORTS_AS_NEW if item.path.name == "sharding_test.py" else self.jax_version
        with contextlib.nullcontext() if self.swap.plain == "alone" else jax.set_mesh(self.mesh):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call":
            item.user_properties.append(("peers", dataclasses.asdict(self.swap.record)))
            report.user_properties = list(item.user_properties)
        return report

    def pytest_runtest_logreport(self, report):
        result = self.results.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "message": ""})
        result["seconds"] += report.duration
        result.update(
            {key: value for name, value in report.user_properties if name == "peers" for key, value in value.items()}
        )
        if report.failed:
            result["outcome"] = "failed"
            with contextlib.suppress(AttributeError):
                result["message"] = result["message"] or report.longrepr.reprcrash.message
        elif report.skipped and result["outcome"] == "passed":
            result["outcome"] = "skipped"
            result["message"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):  # With xdist: the controller, which hears every report.
            Path(self.out).write_text(json.dumps(self.results, indent=1, sort_keys=True))


def pytest_configure(config):
    peers = Peers(os.environ["PEERS_MODE"], os.environ.get("PEERS_PLAIN", ""), os.environ["PEERS_OUT"])
    places = peers.swap.install()
    print(f"peers: replaced in {places} places", file=sys.stderr)
    config.pluginmanager.register(peers, "peers")
