"""`compile_for` without a compiler: names, builders, what crosses to the process and what comes back when it fails."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.topology import CompilationError, MissingExtraError, compile_for, parse_topology
from shardadam.topology.accelerators import h100_config
from shardadam.topology.child import check_built
from shardadam.topology.compiling import _import_path, builder_name


@pytest.mark.parametrize(
    ("name", "slices", "devices", "platform"),
    [
        ("v5p:4x8x8", 1, 256, "tpu"),
        ("v5p:16x20x28", 1, 8960, "tpu"),
        ("v5e:16x16", 2, 512, "tpu"),
        ("tpu7x:4x4x4", 1, 128, "tpu"),
        ("h100:4x8x8", 1, 256, "gpu"),
    ],
)
def test_names(name, slices, devices, platform):
    found = parse_topology(name, slices)
    assert (found.num_devices, found.platform, found.extra) == (devices, platform, f"aot-{platform}")


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v5p", 1, "got 'v5p', wanted a name such as v5p:4x8x8"),
        ("v5p:4x0x8", 1, "got 'v5p:4x0x8', wanted a name"),
        ("b200:1x1x8", 1, "got the chip 'b200', wanted one of v4, v5e, v5p, v6e, tpu7x or h100"),
        ("v5e:4x4x4", 1, "with 3 dims, v5e has 2"),
        ("v5e:4x4", 0, "num_slices: got 0"),
        ("h100:1x1x8", 2, "num_slices: got 2 for 'h100:1x1x8'; of GPUs the name says it"),
    ],
)
def test_names_that_are_refused(name, slices, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name, slices)


def test_a_builder_must_be_found_by_another_process():
    assert builder_name("package.module:build") == "package.module:build"
    assert builder_name(h100_config) == "shardadam.topology.accelerators:h100_config"
    assert builder_name(test_names) == "test_topology:test_names"
    assert builder_name("here.py:build").endswith("/here.py:build")
    for bad in (lambda target: target, "module", "module:", parse_topology("v5e:4x4").__str__):
        with pytest.raises(ValueError, match="build: got"):
            builder_name(bad)


def test_kwargs_must_be_json():
    with pytest.raises(ValueError, match=r"kwargs: got .* wanted what JSON can hold"):
        compile_for("v5e:2x2", "a.b:c", kwargs={"x": object()})


def test_packages_of_this_environment_do_not_reach_another_python():
    assert not [path for path in _import_path() if "site-packages" in path]
    assert any((__file__).startswith(path) for path in _import_path())


def test_the_extra_is_asked_for_by_name():
    has = {"libtpu": "v5e:2x2", "jax_cuda12_plugin": "h100:1x1x8"}
    missing = [topology for module, topology in has.items() if not _installed(module)]
    if not missing:
        pytest.skip("both compilers are installed")
    with pytest.raises(MissingExtraError, match=r"pip install 'shardadam\[aot-[tg]pu\]'"):
        compile_for(missing[0], "tests.nothing:build")


def _installed(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


def test_a_process_that_dies_or_hangs_is_reported(tmp_path):
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\necho the library says no\nexit 3\n")
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nsleep 250\n")
    for script in (dies, hangs):
        script.chmod(0o755)
    with pytest.raises(CompilationError, match=r"code 3 and no answer:\n  the library says no"):
        compile_for("v5e:2x2", "a.b:c", python=str(dies))
    with pytest.raises(CompilationError, match=r"2 x v5e:2x2: not compiled after 0.5 s; killed"):
        compile_for("v5e:2x2", "a.b:c", num_slices=2, python=str(hangs), timeout_seconds=0.5)


def test_what_a_builder_returns_is_checked():
    mesh = jax.make_mesh((1,), ("data",))
    step, scalar = jax.jit(lambda t, x: t * x), jax.ShapeDtypeStruct((), jnp.float32)
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P()))
    # An argument that says no place may come first.
    assert check_built((step, scalar, x)) == (step, [scalar, x], mesh)
    for built in (None, step, (step,), (step, scalar), (lambda x: x, x), ()):
        with pytest.raises(ValueError, match=r"build: it returned .*; wanted \(step, \*args\)"):
            check_built(built)


def test_importing_starts_nothing():
    import subprocess

    code = "import shardadam.topology, sys; assert 'libtpu' not in sys.modules; import jax; jax.devices()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)
