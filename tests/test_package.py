"""The package as such: lazy, typed, and quiet under strict promotion."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import shardadam


def test_every_public_name_is_there():
    for name in shardadam.__all__:
        assert getattr(shardadam, name).__doc__, name
    assert set(shardadam.__all__) <= set(dir(shardadam))
    with pytest.raises(AttributeError, match="no attribute 'sgd'"):
        _ = shardadam.sgd


def test_the_order_of_imports_hides_nothing():
    code = "import shardadam; shardadam.TrainState; shardadam.Checkpointer; assert callable(shardadam.adam)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def test_import_does_not_wait_for_jax():
    code = "import sys, shardadam; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def test_the_update_runs_under_strict_promotion(data_mesh):
    params = {"w": np.ones((16, 8), np.float32), "o": np.ones((17, 257), np.float32)}
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    tx = shardadam.adamw(1e-2, mu_dtype="bfloat16", plan=shardadam.make_plan(params, data_mesh))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-2 * (1 + 1e-4), rtol=1e-5)
