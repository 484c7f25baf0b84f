"""Peak memory of a restore, in two processes that hold half of the shards each."""

from test_any_mesh import launch


def test_a_restore_takes_no_more_than_two_and_a_half_times_its_own_shards(tmp_path):
    # What malloc keeps of what was freed would hide what is taken again.
    malloc = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
    times, own = launch("memory", tmp_path, processes=2, devices=4, **malloc)
    assert own > 70e6
    assert 0.9 < times <= 2.5
