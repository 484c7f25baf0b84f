"""`scripts/bench_experiments`: its kernel is Adam, its readers count right, and its pages say what was found."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from test_goldens import needs

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "topologies"))
import experiments
import option_cases
import pallas_cases
from pallas_adam import compare_with_optax

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
PALLAS, ORDERS, OPTIONS = (
    json.loads((BENCHMARKS / f"{name}.json").read_text()) for name in ("pallas", "orders", "options")
)

TEXT = """HloModule update, is_scheduled=true

ENTRY %main (a: bf16[64,1024], m: f32[64,1024], n: s32[]) -> (bf16[64,1024], f32[64,1024]) {
  %a = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %m = f32[64,1024]{1,0:T(8,128)} parameter(1)
  %n = s32[]{:T(128)} parameter(2)
  %next = s32[]{:T(128)S(6)} add(%n, %n)
  %copy-start = (f32[64,1024]{1,0:T(8,128)S(1)}, f32[64,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%m)
  %copy-done = f32[64,1024]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fused = (bf16[64,1024]{1,0:T(8,128)(2,1)}, f32[64,1024]{1,0:T(8,128)}) fusion(%a, %copy-done, %next), kind=kLoop
  %x = bf16[64,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%fused), index=0
  %y = f32[64,1024]{1,0:T(8,128)} get-tuple-element(%fused), index=1
  ROOT %out = (bf16[64,1024]{1,0:T(8,128)(2,1)}, f32[64,1024]{1,0:T(8,128)}) tuple(%x, %y)
}
"""


@pytest.mark.parametrize(("param", "grad"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_pallas_kernel_is_optax_adam_to_the_bit(param, grad):
    apart = compare_with_optax(shape=(64, 512), param_dtype=param, grad_dtype=grad, block=(32, 256))
    assert apart == {"param": 0, "mu": 0, "nu": 0}


def test_bytes_in_hbm_are_counted_once_and_those_in_vmem_not():
    # The fusion reads a (2 bytes) and what was copied to VMEM (none), and writes both; the copy reads m.
    size = 64 * 1024
    assert pallas_cases.kernels(TEXT) == {"copy-start": 4 * size, "fused": (2 + 2 + 4) * size}


@pytest.mark.parametrize("kernel", [pytest.param(name, marks=needs("tpu")) for name in ("xla", "pallas")])
def test_an_update_reads_and_writes_each_array_once(kernel, tmp_path, monkeypatch):
    monkeypatch.delenv(
        "JAX_NUMPY_DTYPE_PROMOTION", raising=False
    )  # The tests' is strict; the process would have it, too.
    case = pallas_cases.cases()[f"v5e | bfloat16 | {pallas_cases.SHAPE} | {kernel}"]
    found = pallas_cases.read(case, experiments.compile_for(**case, cache_dir=tmp_path))
    assert found["kernels"] == 1
    assert found["moved_bytes"] == pytest.approx(found["ideal_bytes"], rel=1e-4)
    assert (found["temp_bytes"], found["not_donated"], found["collectives"]) == (0, [], 0)


def test_xla_leaves_nothing_to_a_kernel_by_hand_on_any_tpu():
    for chip in pallas_cases.CHIPS:
        for what in (
            f"bfloat16 | {pallas_cases.SHAPE}",
            f"float32 | {pallas_cases.SHAPE}",
            f"bfloat16 | {pallas_cases.ODD}",
        ):
            xla, pallas = (PALLAS[f"{chip} | {what} | {kernel}"] for kernel in ("xla", "pallas"))
            assert xla["kernels"] == 1
            assert xla["temp_bytes"] == 0
            assert xla["moved_bytes"] <= pallas["moved_bytes"]
    assert all(set(found["ulps"].values()) == {0} for found in PALLAS.values() if "ulps" in found)


def sent(found):
    """What goes on the wire over the ideal, and the part of it that is all-reduced."""
    wire = found["wire_bytes"]
    return sum(wire.values()) / found["ideal_bytes"], wire.get("all-reduce", 0) / found["ideal_bytes"]


def test_every_order_of_a_torus_reduces_in_real_reduce_scatters():
    for key, found in ORDERS.items():
        _, _, order = key.split(" | ")
        total, reduced = sent(found)
        if " " in order:
            assert total < 1.15, key
            assert reduced < 0.001, key
        else:
            assert total > 1.4, key


REAL, SPARSE = "real reduce-scatter and gather", "reduce-scatter on sparse cores"
WITH_GATHER = ("real gather", "all on sparse cores")


@pytest.mark.parametrize(
    ("where", "plain", "better"),
    [
        ("v5p-64", 2.0, {"nd reduce-scatter": 1.5, **dict.fromkeys(WITH_GATHER, 1.5), REAL: 1.0}),
        ("v6e-256", 1.5, {"nd reduce-scatter": 1.0, REAL: 1.0}),
        ("tpu7x-64", 1.5, {"gather, not all-reduce": 1.0, **dict.fromkeys(WITH_GATHER, 1.0), REAL: 1.0}),
    ],
)
def test_what_options_make_of_one_collective_over_all(where, plain, better):
    for name in option_cases.OPTIONS:
        found = OPTIONS[f"{where} | update, joint | {name}"]
        if name == "a name that is none":
            assert "No such compile option: 'xla_enable_reduce_scatter'" in found["error"]
        else:
            assert sent(found)[0] == pytest.approx(better.get(name, plain), rel=0.01), name


@pytest.mark.parametrize("what", ["v5p-64 | 1.3B", "v5p-256 | 8B", "v6e-256 | 8B"])
def test_on_sparse_cores_one_axis_at_a_time_sends_the_ideal_in_the_background(what):
    plain, found = (OPTIONS[f"{what}, per axis | {name}"] for name in ("none", SPARSE))
    assert sent(found)[0] == pytest.approx(1, abs=0.001)
    assert sent(found)[0] < sent(plain)[0]
    assert found["wire_bytes"]["async reduce-scatter"] > 0.99 * found["ideal_bytes"] / 2
    assert found["peak_bytes"] < 1.005 * plain["peak_bytes"]


@pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
def test_pages_are_those_of_the_results(name):
    results = json.loads((BENCHMARKS / f"{name}.json").read_text())
    module = importlib.import_module(experiments.EXPERIMENTS[name])
    assert set(results) == set(module.cases())
    page = module.page(results, experiments.made_with(results))
    assert (BENCHMARKS / f"{name}.md").read_text() == page, f"./scripts/bench_experiments {name} --report"
