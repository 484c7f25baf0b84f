import functools
import os

import pytest
from jax.sharding import AxisType
from tiny import tiny_config

from shardadam.trainer.config import ConfigError
from shardadam.trainer.devices import build_mesh, fill_mesh, mesh_text, parse_mesh, planned_mesh, start_devices


@pytest.fixture
def tiny(tmp_path):
    return functools.partial(tiny_config, tmp_path)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=4,model=2", {"data": 4, "model": 2}),
        (" model = 2 , data = 4 ", {"model": 2, "data": 4}),
        ("data=-1", {"data": -1}),
        ("auto", {"data": -1}),
    ],
)
def test_parse_mesh(text, sizes):
    assert parse_mesh(text) == sizes
    assert parse_mesh(mesh_text(sizes)) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'mesh' is '': cannot read ''; wanted axes and sizes such as 'data=4,model=2'"),
        ("data=4,", "cannot read ''"),
        ("data:4", "cannot read 'data:4'"),
        ("data=0", "cannot read 'data=0'"),
        ("data=-2", "cannot read 'data=-2'"),
        ("data=4,fsdp=2", "axis 'fsdp' is unknown: the axes are 'data' and 'model'"),
        ("data=4,data=2", "axis 'data' is given twice"),
        ("model=2", "no 'data' axis"),
        ("data=-1,model=-1", "more than one -1"),
    ],
)
def test_a_mesh_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_mesh(text)
    assert message in str(caught.value)


def test_fill_mesh():
    assert fill_mesh({"data": -1, "model": 2}, 8) == {"data": 4, "model": 2}
    assert fill_mesh({"data": 3}, 8) == {"data": 3}
    for sizes in ({"data": -1, "model": 3}, {"data": -1, "model": 16}):
        with pytest.raises(ConfigError, match="8 devices cannot be split over data=-1"):
            fill_mesh(sizes, 8)


def test_build_mesh(tiny):
    mesh = build_mesh(tiny(mesh="data=-1,model=2"))
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert build_mesh(tiny(mesh="data=3")).size == 3


def test_more_devices_than_there_are(tiny):
    with pytest.raises(ConfigError, match=r"'data=8,model=2', which needs 16 devices; there are 8 \(cpu\): unset .*16"):
        build_mesh(tiny(mesh="data=8,model=2"))


def test_planning_needs_no_devices(tiny):
    assert planned_mesh(tiny(mesh="data=512")) == {"data": 512}
    assert planned_mesh(tiny(mesh="data=-1,model=2", cpu_devices=24)) == {"data": 12, "model": 2}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--xla_force_host_platform_device_count=6 --xla_cpu_multi_thread_eigen=false"),
        ("--a=1", "--a=1 --xla_force_host_platform_device_count=6 --xla_cpu_multi_thread_eigen=false"),
        (
            "--xla_force_host_platform_device_count=2",
            "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false",
        ),
    ],
)
def test_the_users_own_xla_flags_stand(monkeypatch, tiny, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    start_devices(tiny(mesh="data=3,model=2"))
    assert os.environ["XLA_FLAGS"] == after


def test_one_device_keeps_its_threads(monkeypatch, tiny):
    monkeypatch.setenv("XLA_FLAGS", "")
    start_devices(tiny(mesh="data=1"))
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=1"
