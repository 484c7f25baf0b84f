import numpy as np
import pytest

from shardadam.trainer.build import learning_rate_schedule
from shardadam.trainer.config import OptimizerConfig


def test_the_schedules_three_regimes():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=4, decay_steps=24, end_fraction=0.1)
    rates = np.array([float(learning_rate_schedule(config)(step)) for step in range(40)])
    np.testing.assert_allclose(rates[:5], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    assert rates[14] == pytest.approx((0.5 + 0.05) / 2)
    assert (np.diff(rates[4:24]) < 0).all()
    np.testing.assert_allclose(rates[24:], 0.05, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=0, decay_steps=4))
    assert float(schedule(0)) == 0.5
