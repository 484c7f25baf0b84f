"""`shardadam checkpoint`: what each command prints and its exit code, in this process; memory in one of its own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from etils import epath
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from trees import assert_same_bits, by_path, put, random_tree

import shardadam
from shardadam.checkpoint import Checkpointer
from shardadam.checkpoint.digest import host_digest
from shardadam.checkpoint.steps import Steps
from shardadam.cli import main

ROOT = Path(__file__).parents[2]
SHAPES = {"kernel": (64, 48), "odd": (17, 257), "tiny": (7,)}


def state_of(seed, mesh):
    params = put(random_tree(seed, shapes=SHAPES), mesh)
    tx = shardadam.adam(1e-2, plan=shardadam.make_plan(params, mesh, min_size=100))
    moments = tx.init(params)
    return {"step": seed, "params": params, "opt_state": moments}, tx.plan_of(params)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_mesh):
    """`plain`: a tree of optax's; `ours`: steps 1 and 2 of a Checkpointer."""
    directory = tmp_path_factory.mktemp("cli")
    params = put(random_tree(5, shapes=SHAPES), make_mesh({"data": 1}))
    plain = {"step": 3, "params": params, "opt_state": optax.adam(1e-2).init(params)}
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(directory / "plain", plain)
    for seed in (1, 2):
        state, plan = state_of(seed, data_mesh)
        with Checkpointer(directory / "ours", plan=plan) as checkpointer:
            checkpointer.save(seed, state)
    return directory, plain


@pytest.fixture
def run(runs, tmp_path, capsys, monkeypatch):
    """`run("list ours --json")`: (exit code, what was printed); paths are below the fixture's directory."""
    monkeypatch.chdir(runs[0])

    def run(line, code=0):
        got = main(["checkpoint", *shlex.split(line.replace("TMP", str(tmp_path)))])
        shown = capsys.readouterr()
        assert got == code, shown.err
        assert "Traceback" not in shown.err
        return shown.err if code == 2 else json.loads(shown.out) if "--json" in line else shown.out

    return run


def test_list(run):
    first, second = run("list ours --json")
    assert (first["step"], second["step"]) == (1, 2)
    files = [path for path in Path("ours/1").rglob("*") if path.is_file()]
    assert (first["num_files"], first["nbytes"]) == (len(files), sum(path.stat().st_size for path in files))
    assert [line.split()[0] for line in run("list ours").splitlines()] == ["step", "1", "2"]


def test_show_names_every_leaf_with_the_digest_that_its_bits_have(run, runs):
    found = run("show plain --digests --json")
    assert found["form"] == "train_state: 3 parameters, optimizer (ScaleByAdamState, -)"
    rows = {row["leaf"]: row for row in found["leaves"]}
    wanted = by_path(runs[1]["params"])
    assert len(rows) == 3 * 3 + 2
    for name, x in wanted.items():
        row = rows[f"params/{name}"]
        assert (row["dtype"], row["shape"], row["nbytes"]) == ("float32", list(x.shape), x.nbytes)
        assert row["digest"] == host_digest(np.asarray(x), f"params/{name}").text
        assert row["num_nonfinite"] == 0
    text = run("show ours")
    assert "ours/2: step 2 (of 2), item 'state'" in text
    assert "digest" not in text


def test_import_and_export_leave_every_digest_as_it_was(run):
    digests = {row["leaf"]: row["digest"] for row in run("show plain --digests --json")["leaves"]}
    written = run("import plain TMP/ours --json")
    assert (written["step"], written["num_leaves"], written["form"]) == (3, 11, "train_state")
    imported = run("show TMP/ours/3 --digests --json")["leaves"]
    assert {row["leaf"]: row["digest"] for row in imported} == digests
    assert "written" in run("export TMP/ours TMP/back")
    exported = run("show TMP/back --digests --json")["leaves"]
    assert {row["leaf"]: row["digest"] for row in exported} == digests
    assert run("diff plain TMP/back") == "11 leaves are equal, 0 are not\n"


@pytest.mark.parametrize(("where", "count"), [("opt_state/0/nu/kernel", 2), ("decay", 1)])
def test_what_is_not_finite_is_imported_only_if_that_is_said(run, runs, tmp_path, where, count):
    """An array, and a Python number: what was imported before stays the newest, and nothing of the bad one is left."""
    adam, rest = runs[1]["opt_state"]
    tree = {"step": 4, "params": runs[1]["params"], "opt_state": (adam, rest), "decay": 0.5}
    if where == "decay":
        tree["decay"] = float("inf")
    else:
        nu = np.asarray(adam.nu["kernel"]).copy()
        nu[1, 2], nu[3, 4] = np.inf, np.nan
        tree["opt_state"] = (adam._replace(nu=adam.nu | {"kernel": nu}), rest)
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "bad", tree)
    run("import plain TMP/ours")
    message = run("import TMP/bad TMP/ours", code=2)
    assert re.search(
        f"step 4: not imported: `{where}`: {count} elements are NaN or infinite.*--allow-nonfinite", message
    )
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["3", "seals"]

    run("import TMP/bad TMP/ours --allow-nonfinite")
    bad = {row["leaf"]: row["num_nonfinite"] for row in run("show TMP/ours/4 --digests --json")["leaves"]}
    assert {leaf: found for leaf, found in bad.items() if found} == {where: count}
    run("verify TMP/ours --all --digests")


def test_parameters_alone_for_serving(run, runs):
    run("export plain TMP/serving --to params --dtype bfloat16")
    rows = {row["leaf"]: row for row in run("show TMP/serving --digests --json")["leaves"]}
    for name, x in by_path(runs[1]["params"]).items():
        assert rows[name]["digest"] == host_digest(np.asarray(x.astype(jnp.bfloat16)), name).text
    assert set(rows) == set(SHAPES)


def test_diff_says_where_and_by_how_much(run, runs, tmp_path):
    tree = jax.tree.map(lambda x: x, runs[1])
    kernel = np.asarray(tree["params"]["kernel"]).copy()
    kernel[3, 4] += 0.5
    kernel[5, 6] = np.nan
    tree["params"] |= {"kernel": kernel, "odd": tree["params"]["odd"].astype(jnp.bfloat16), "new": np.ones(2)}
    tree["params"]["tiny"] = np.zeros(8, np.float32)
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "other", tree)
    text = run("diff plain TMP/other", code=1)
    assert text.splitlines() == [
        "params/odd: float32[17, 257] in a, bfloat16[17, 257] in b",
        "params/tiny: float32[7] in a, float32[8] in b",
        "params/new: only in b: float64[2]",
        "params/kernel: 2 elements of float32[64, 48] differ, by up to 0.5",
        "8 leaves are equal, 4 are not",
    ]
    found = run("diff plain TMP/other --json", code=1)
    assert [(row["what"], row["num_different"]) for row in found["leaves"]][2:] == [("only in b", None), ("values", 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("list nowhere", "shardadam checkpoint list: .*nowhere: no such directory"),
        ("show nowhere", "nowhere: no such directory"),
        ("import ours/1 ours", "step 1: .* holds step 2 already"),
        ("export ours plain", "plain: is there already"),
        ("export ours TMP/x --step 9", r"step 9: not in .*, which holds \[1, 2\]"),
        ("export ours TMP/x --dtype float16", "only to='params' can be cast"),
        ("export ours TMP/x --to params --dtype float17", "dtype: got 'float17', wanted a floating dtype"),
        ("export ours TMP/x --to params --dtype int8", "dtype: got 'int8', wanted a floating dtype"),
        ("adopt TMP/x 1", "x: no such directory"),
        ("import plain TMP/x --drop params/none", "--drop params/none: not in the checkpoint"),
    ],
)
def test_what_cannot_be_done_is_exit_code_2_and_a_message(run, tmp_path, line, message):
    assert re.search(message, run(line, code=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"tree_metadata": {"a": {}}}'])
def test_metadata_that_is_damaged_is_told_with_its_place(run, tmp_path, text):
    shutil.copytree("ours", tmp_path / "ours")
    (tmp_path / "ours/2/state/_METADATA").write_text(text)
    for line in ("show TMP/ours", "diff ours TMP/ours", "export TMP/ours TMP/x", "import TMP/ours/2 TMP/x"):
        assert re.search("ours/2/state: its metadata cannot be read, it may be damaged", run(line, code=2))
    assert "state/_METADATA: has" in run("verify TMP/ours", code=1)


def test_show_says_what_is_the_matter_with_a_seal(run, tmp_path):
    shutil.copytree("ours", tmp_path / "ours")
    (tmp_path / "ours/seals/2.json").write_text("{")
    assert "the seal is damaged: it cannot be read" in run("show TMP/ours")
    found = run("show TMP/ours --json")
    assert (found["seal"], found["without"][:19]) == (None, "the seal is damaged")
    assert run("show ours --json")["without"] == ""
    assert run("show plain --json")["without"] == "no seal"


def test_an_empty_tuple_is_no_leaf(run, runs, tmp_path):
    """As `optax.chain()` has for its state; Orbax keeps it as such, and not as a list."""
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "plain", runs[1] | {"more": (), "opt_state": (*runs[1]["opt_state"], ())})
    found = run("show TMP/plain --digests --json")
    assert (len(found["leaves"]), found["form"]) == (
        11, "train_state: 3 parameters, optimizer (ScaleByAdamState, -, -), besides more",
    )  # fmt: skip
    assert run("import TMP/plain TMP/ours --json")["num_leaves"] == 11
    assert run("export TMP/ours TMP/back --json")["num_leaves"] == 11
    assert run("diff TMP/plain TMP/back") == "11 leaves are equal, 0 are not\n"


class TestSealed:
    """An import is sealed with the digests of its source; verify, adopt and prune."""

    @pytest.fixture
    def steps(self, run, tmp_path):
        for number in (3, 4, 5, 6):
            run(f"import plain TMP/{number}-apart")
            step = tmp_path / f"{number}-apart" / "3"
            step.rename(tmp_path / f"{number}")
        (tmp_path / "many").mkdir()
        for number in (3, 4, 5, 6):
            (tmp_path / f"{number}").rename(tmp_path / "many" / f"{number}")
            run(f"adopt TMP/many {number}")
        return tmp_path / "many"

    def test_an_import_has_the_seal_of_its_source(self, run, runs, tmp_path):
        digests = {row["leaf"]: row["digest"] for row in run("show plain --digests --json")["leaves"]}
        run("import plain TMP/ours")
        seal = Steps(epath.Path(tmp_path / "ours")).read_seal(3)
        assert {path: leaf.digest for path, leaf in seal.leaves.items()} == digests
        assert (seal.origin, seal.count) == ("imported", 0)
        assert run("show TMP/ours --json")["seal"]["origin"] == "imported"
        (verdict,) = run("verify TMP/ours --digests --json")
        assert (verdict["step"], verdict["faults"]) == (3, [])
        with Checkpointer(tmp_path / "ours") as checkpointer:
            assert_same_bits(checkpointer.restore(runs[1], verify="full"), runs[1])

    def test_verify_finds_a_flipped_bit_and_export_refuses(self, run, tmp_path):
        run("import plain TMP/ours")
        assert run("verify TMP/ours/3") == "step 3: as it was saved\n"
        largest = max((tmp_path / "ours/3").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        assert "its bytes are not those that were sealed" in run("verify TMP/ours", code=1)
        assert "is damaged" in run("export TMP/ours TMP/back", code=2)
        assert not (tmp_path / "back").exists()
        (tmp_path / "ours/seals/3.json").unlink()
        assert run("verify TMP/ours --all", code=1) == "step 3: no seal\n"
        assert run("list TMP/ours --json")[0]["state"] == "no seal"

    def test_prune_counts_no_step_whose_seal_cannot_be_read(self, run, steps):
        for step in (5, 6):
            (steps / f"seals/{step}.json").write_text("{")
        assert run(f"prune {steps} --keep 2 --dry-run --json") == {"deleted": [], "kept": [3, 4, 5, 6]}
        assert run(f"prune {steps} --keep 2 --json") == {"deleted": [], "kept": [3, 4, 5, 6]}
        run(f"verify {steps}/4")

    def test_prune_keeps_two_and_the_periods(self, run, steps):
        assert "would be deleted: 4; kept: 3, 5, 6" in run(f"prune {steps} --keep 2 --keep-period 3 --dry-run")
        assert [row["step"] for row in run(f"list {steps} --json")] == [3, 4, 5, 6]
        assert run(f"prune {steps} --keep 2 --keep-period 3 --json") == {"deleted": [4], "kept": [3, 5, 6]}
        assert [(row["step"], row["state"]) for row in run(f"list {steps} --json")] == [
            (3, "adopted"), (5, "adopted"), (6, "adopted"),
        ]  # fmt: skip
        assert "wanted 2 or more" in run(f"prune {steps} --keep 1", code=2)
        with Checkpointer(steps) as checkpointer:
            checkpointer.lock()
            assert "another Checkpointer of this process" in run(f"prune {steps} --keep 2", code=2)
        assert [row["step"] for row in run(f"list {steps} --json")] == [3, 5, 6]


def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []

    def command(example):
        for line in example.parsed.splitlines():
            assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
            done.append(line.split()[2])

    parsers = [PythonCodeBlockParser(), CodeBlockParser("sh", command)]
    for example in Sybil(parsers, path=str(ROOT)).parse(ROOT / "docs" / "converting.md").examples():
        example.evaluate()
    assert done == ["import", "show", "diff", "export", "export", "list", "verify", "prune"]
    assert "kept: 500" in capsys.readouterr().out


@pytest.mark.slow
def test_no_more_is_in_memory_than_a_few_copies_of_a_leaf(tmp_path):
    """On one device: a checkpoint of three times the size takes hardly more than the small one did."""
    rng = np.random.default_rng(0)
    for name, num_leaves, rows in (("small", 4, 1024), ("large", 12, 1024)):
        params = {f"w{i}": rng.standard_normal((rows, 1024), np.float32) for i in range(num_leaves)}
        adam = optax.ScaleByAdamState(jnp.int32(1), mu=params, nu=params)
        with ocp.StandardCheckpointer() as orbax:
            orbax.save(tmp_path / name, {"params": params, "opt_state": (adam,)})
    total = 3 * sum(x.nbytes for x in params.values())
    program = [sys.executable, str(Path(__file__).with_name("convert_memory.py")), str(tmp_path), str(tmp_path / "to")]
    # An arena of glibc's per thread would keep what the thread has freed, which would be measured.
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "MALLOC_ARENA_MAX": "2"}
    ran = subprocess.run(program, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < total / 2
