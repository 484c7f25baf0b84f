"""A few of the faults that `scripts/torture_checkpoints` injects by the thousand: one of each kind, none silent."""

import random

import faults
import pytest


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "clean"
    faults.clean_directory(path)
    return path, faults.all_truth()


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_is_silent(fault, clean, tmp_path):
    path, truth = clean
    faults.inject(path, tmp_path, fault, random.Random(fault.__name__), truth)


@pytest.mark.parametrize("fault", [faults.flip, faults.lose_page, faults.delete], ids=lambda fault: fault.__name__)
def test_no_fault_of_a_large_file_is_silent(fault, clean, tmp_path, monkeypatch):
    path, truth = clean
    monkeypatch.setattr(faults, "any_file", faults.large_file)
    assert faults.inject(path, tmp_path, fault, random.Random(1), truth, check="files").of_large


def test_a_fault_that_changes_nothing_fails_the_injector(clean, tmp_path):
    path, truth = clean
    with pytest.raises(AssertionError, match="not applied"):
        faults.inject(path, tmp_path, lambda rng, root: 1, random.Random(0), truth)


def test_a_fault_that_is_not_found_fails_the_injector(clean, tmp_path):
    path, truth = clean

    def elsewhere(rng, root):
        (root / "note.txt").write_text("no step")
        return 1

    with pytest.raises(AssertionError, match="elsewhere in step 1: silent"):
        faults.inject(path, tmp_path, elsewhere, random.Random(0), truth)
