"""A share of optax's own tests with shardadam's Adam in them, on eight devices; `scripts/peers` runs them all."""

import optax
import pytest
from peers_run import expected, judge, run, uses, uses_version, went_through

pytestmark = pytest.mark.slow

FILES = ("alias_test", "combine_test", "_state_utils_test", "_inject_test", "sharding_test")
SLOW = ("test_optimization", "test_state_shape_dtype_shard_stability")  # ten thousand steps; minutes of compiling


def share() -> list[str]:
    return [
        test for test in uses() if any(f"/{name}.py" in test for name in FILES) and not any(s in test for s in SLOW)
    ]


@pytest.fixture(scope="module")
def packed_run():
    if uses_version() != optax.__version__:
        pytest.skip(
            f"uses.txt lists the tests of optax {uses_version()}, not {optax.__version__}: scripts/peers --discover"
        )
    return run("packed", share())


def test_optax_s_own_tests_pass_with_the_state_packed_over_eight_devices(packed_run):
    assert judge("packed", packed_run) == []


def test_every_one_of_them_went_through_our_code_on_eight_devices(packed_run):
    assert set(packed_run) == set(share())
    assert all(went_through(result) for result in packed_run.values())
    assert sum(result["split"] > 0 for result in packed_run.values()) > 100
    assert sum(result["measured"] > 0 for result in packed_run.values()) > 50


def test_only_the_listed_ones_failed(packed_run):
    failed = {test for test, result in packed_run.items() if result["outcome"] == "failed"}
    assert failed == set(expected("packed")) & set(share())
    assert len(failed) == 2
