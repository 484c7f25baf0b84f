"""What the TPU and GPU compilers make of small steps, equal to what was recorded: where a compiler is installed."""

import importlib.metadata
import json
import math

import pytest
from goldens import CASES, GOLDENS, PROGRAMS, compiled, record
from programs import AWKWARD

from shardadam.topology import CompilationError, compile_for

PACKAGE = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def needs(platform):
    return pytest.mark.skipif(
        installed(PACKAGE[platform]) is None, reason=f"needs the extra aot-{platform}: {PACKAGE[platform]}"
    )


CASE_MARKS = [pytest.param(p, name, id=name, marks=needs(p)) for p, cases in CASES.items() for name in cases]


@pytest.mark.parametrize(("platform", "name"), CASE_MARKS)
def test_equal_to_the_golden(platform, name, tmp_path):
    golden = json.loads((GOLDENS / f"{platform}.json").read_text())
    versions = {package: installed(package) for package in golden["versions"]}
    if versions != golden["versions"]:
        pytest.skip(f"recorded with {golden['versions']}, here are {versions}")
    found = compiled(platform, name, cache_dir=tmp_path)
    assert found.versions == golden["versions"]
    assert record(found) == golden["cases"][name], f"./scripts/goldens {platform} renews it, if that is meant"


@needs("tpu")
def test_a_second_time_comes_from_the_cache_and_an_option_does_not(tmp_path):
    first = compiled("tpu", "v5e step joint", cache_dir=tmp_path)
    again = compiled("tpu", "v5e step joint", cache_dir=tmp_path)
    other = compiled("tpu", "v5e step joint nd", cache_dir=tmp_path)
    assert again == first  # Its seconds as well: it was not compiled again.
    assert other.key != first.key
    assert len(list(tmp_path.iterdir())) == 2
    assert first.num_devices == 16
    assert first.memory.donation_complete


@needs("tpu")
def test_what_a_builder_raises_is_told():
    with pytest.raises(CompilationError, match=r"v5e:2x2: TypeError: .*no_such_argument"):
        compile_for("v5e:2x2", "shardadam.topology.names:parse_topology", kwargs={"no_such_argument": 1})


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_there_is_a_golden_for_every_case(platform):
    golden = json.loads((GOLDENS / f"{platform}.json").read_text())
    assert list(golden["cases"]) == list(CASES[platform])
    pins = (GOLDENS / f"{platform}.txt").read_text().split()
    assert pins == [f"{name}=={version}" for name, version in golden["versions"].items()]


def test_reduce_scatters_are_real_on_every_tpu_when_axes_are_the_torus():
    golden = json.loads((GOLDENS / "tpu.json").read_text())["cases"]
    for name in (name for name in golden if "per axis" in name):
        ops = golden[name]["collectives"]
        assert any("reduce-scatter" in op for op in ops), name
        assert not any("all-reduce" in op and "in a loop" in op for op in ops), name
        assert golden[name]["memory"]["not_donated"] == [], name


@needs("tpu")
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:16x16"])
def test_awkward_leaves_are_scattered_in_whole_tiles(topology, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUMPY_DTYPE_PROMOTION", raising=False)
    found = compile_for(topology, f"{PROGRAMS}:awkward_step", cache_dir=tmp_path)
    assert not [op for op in found.collectives if op.op == "all-reduce" and op.total_wire_bytes > 100_000]
    ideal = 2 * 2 * sum(math.prod(shape) for shape in AWKWARD.values()) * (1 - 1 / found.num_devices)
    assert sum(op.total_wire_bytes for op in found.collectives) < 1.01 * ideal  # All-reduces in part: 1.05 to 1.2.


@pytest.mark.parametrize(
    "topology", [pytest.param("h100:1x1x8", marks=needs("gpu")), pytest.param("v5e:4x4", marks=needs("tpu"))]
)
def test_skipping_takes_no_more_memory_than_clipping(topology, tmp_path, monkeypatch):
    """Both wait for the norm of all gradients; what is selected by it is selected in place."""
    monkeypatch.delenv("JAX_NUMPY_DTYPE_PROMOTION", raising=False)

    def memory(**options):
        return compile_for(topology, f"{PROGRAMS}:many_leaves_step", kwargs=options, cache_dir=tmp_path).memory

    plain, clipped = memory(), memory(max_grad_norm=1.0)
    for skipping in (memory(skip_nonfinite=True), memory(skip_nonfinite=True, max_grad_norm=1.0)):
        assert skipping.peak_bytes <= clipped.peak_bytes + 4096  # Scalars; a shard of one leaf has 32 KiB or more.
        assert skipping.donation_complete
        if topology.startswith("h100"):
            assert skipping.temp_bytes <= plain.temp_bytes + 4096
