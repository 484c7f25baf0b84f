import functools
import json
import threading
from dataclasses import replace

import pytest
from tiny import tiny_config

from shardadam import runtime
from shardadam.trainer.agreement import check_alike, stop_agreement
from shardadam.trainer.config import ConfigError


@pytest.fixture
def tiny(tmp_path):
    return functools.partial(tiny_config, tmp_path)


def test_processes_that_are_not_alike_are_refused(monkeypatch, tiny):
    said = []
    monkeypatch.setattr(runtime, "from_process_zero", lambda name, value: said.append(value) or value)
    check_alike(tiny(), "ab")
    assert json.loads(said[0])["text"] == "ab"
    monkeypatch.setattr(runtime, "from_process_zero", lambda name, value: said[0])
    check_alike(tiny(), "ab")
    with pytest.raises(ConfigError) as caught:
        check_alike(replace(tiny(), steps=9, seed=1), "cd")
    for part in ("'steps' is 9, there 4", "'seed' is 1, there 0", "'text' is 'cd', there 'ab'", "start all alike"):
        assert part in str(caught.value)


def test_one_process_agrees_with_itself():
    requested = threading.Event()
    with stop_agreement(requested) as stop:
        assert not stop()
        requested.set()
        assert stop()
