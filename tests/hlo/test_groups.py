"""Every form in which XLA writes groups of devices, against groups that are counted out."""

import pytest

from shardadam.hlo.groups import device_groups

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ROWS),
        ("channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}", COLUMNS),
        ("replica_groups={}", (tuple(range(8)),)),
        ("replica_groups=[2,4]<=[8]", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", COLUMNS),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}", ROWS),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", COLUMNS),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", (tuple(range(8)),)),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", ROWS),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", COLUMNS),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", ROWS),
        ("source_target_pairs={{0,2},{3,2},{1,3}}", ((0, 1, 2, 3),)),
    ],
)
def test_forms(text, wanted):
    assert device_groups(text, 8) == wanted


@pytest.mark.parametrize("text", ["", "replica_groups=@ring", "replica_groups=mesh['x'=8, device_ids=[1,0]] {'x'}"])
def test_an_unknown_form_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match="in a form that is not known"):
        device_groups(text, 8)
