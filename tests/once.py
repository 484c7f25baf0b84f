"""What the tests of several pytest processes need, and takes long to make, is made by the first of them alone."""

import fcntl
import os
import shutil


def made_once(tmp_path_factory, name, make):
    """The directory that `make(directory)` has filled, in this process or in another of the same xdist run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of all of them
    directory, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of one that has failed
            directory.mkdir()
            make(directory)
            done.touch()
    return directory
