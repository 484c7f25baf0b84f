import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_raw

from shardadam.cli import main, read_config
from shardadam.trainer.config import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_raw(tmp_path / "runs", steps=2)))
    return str(path)


def test_every_config_opens_with_its_command_and_is_valid():
    assert CONFIGS == ["ci.yaml", "data-tensor.yaml", "gpt2-124m.yaml", "llama3-8b.yaml", "quickstart.yaml"]
    for name in CONFIGS:
        path = ROOT / "configs" / name
        assert load_config(path).name == path.stem
        opening = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
        assert opening[0].startswith("# shardadam ")
        assert f"configs/{name}" in opening[0]
        assert len(opening) >= 3


class TestOverrides:
    def test_the_command_line_goes_over_the_file(self, config_file):
        arguments = "--steps 400 --model.num-layers 3 --model.remat True --optimizer.learning_rate 6e-4 --mesh data=4"
        config = read_config("train", config_file, arguments.split())
        assert (config.steps, config.mesh, config.optimizer.learning_rate) == (400, "data=4", 6e-4)
        assert (config.model.num_layers, config.model.remat, config.model.d_model) == (3, True, 16)

    def test_none(self, config_file):
        config = read_config("train", config_file, ["--data.files", "None", "--train-step.max-grad-norm", "None"])
        assert config.data.files is None
        assert config.train_step.max_grad_norm is None

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["--stepz", "4"], ["--stepz", "--steps"]),
            (["--steps", "many"], ["--steps", "many"]),
            (["--model.mlp", "relu"], ["relu", "swiglu"]),
        ],
    )
    def test_usage_errors_exit_with_2(self, config_file, capsys, arguments, parts):
        with pytest.raises(SystemExit) as caught:
            main(["train", config_file, *arguments])
        assert caught.value.code == 2
        shown = capsys.readouterr()
        for part in parts:
            assert part in shown.err + shown.out

    def test_help_shows_every_field_with_the_files_value(self, config_file, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["train", config_file, "--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        for part in (
            "--steps",
            "--mesh",
            "--model.num-layers",
            "--data.files",
            "--train-step.max-grad-norm",
            "(default: 2)",
        ):
            assert part in shown


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "nowhere.yaml"], "config 'nowhere.yaml': cannot read it"),
            (["train"], "which config? Give the path of a YAML file"),
            (["train", "FILE", "--steps", "-3"], "'steps' is -3; input should be greater than or equal to 0"),
            (["train", "FILE", "--mesh", "data=3"], "'batch_size' is 8, not divisible by 3"),
            (["train", "FILE", "--mesh", "data=16"], "needs 16 devices; there are 8 (cpu)"),
            (["train", "FILE", "--mesh", "fsdp=8"], "axis 'fsdp' is unknown"),
            (["train", "FILE", "--data.files", "nowhere/*.txt"], "'data.files' is 'nowhere/*.txt': no file matches"),
            (["plan", "FILE", "--mesh", "data"], "'mesh' is 'data': cannot read 'data'"),
            (["env", "--steps", "3"], "takes no arguments, got --steps 3"),
        ],
    )
    def test_one_message_and_exit_code_2(self, config_file, capsys, arguments, message):
        assert main([config_file if argument == "FILE" else argument for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert "Traceback" not in shown.err
        assert len(shown.err.strip().splitlines()) == 1
        assert not shown.out

    def test_mistakes_in_the_code_keep_their_traceback(self, config_file, monkeypatch):
        def broken(config):
            raise ValueError("a mistake")

        monkeypatch.setattr("shardadam.trainer.loop.train", broken)
        with pytest.raises(ValueError, match="a mistake"):
            main(["train", config_file])

    def test_a_disk_error_is_told(self, config_file, monkeypatch, capsys):
        def full(config):
            raise OSError(28, "No space left on device", "runs/tiny")

        monkeypatch.setattr("shardadam.trainer.loop.train", full)
        assert main(["train", config_file]) == 1
        assert "No space left on device: 'runs/tiny'" in capsys.readouterr().err


def test_train_from_end_to_end(config_file, tmp_path, capsys):
    assert main(["train", config_file]) == 0
    shown = capsys.readouterr().out
    for part in (
        "done: step 2", "bits per byte; bz2 -9 takes", "in 8 shards; replicated Adam would hold", "tiny/checkpoints/2",
    ):  # fmt: skip
        assert part in shown
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "run.json").read_text())["num_params"] > 0
    assert {"config.yaml", "plan.txt", "metrics.jsonl"} <= {path.name for path in run.iterdir()}


class TestPlan:
    def test_llama_on_512_devices(self, capsys):
        assert main(["plan", str(ROOT / "configs" / "llama3-8b.yaml")]) == 0
        shown = capsys.readouterr().out
        assert "512 shards" in shown
        assert "8,030,261,248 parameters" in shown

    def test_an_override_changes_the_plan(self, capsys):
        assert main(["plan", str(ROOT / "configs" / "gpt2-124m.yaml"), "--mesh", "data=7"]) == 0
        assert "7 shards" in capsys.readouterr().out


def test_env(capsys):
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "python ",
        "jax ",
        "jaxlib ",
        "flax ",
        "optax ",
        "orbax-checkpoint ",
        "shardadam ",
        "8 x cpu",
        "device",
    ):
        assert part in shown
    assert "processes          1" in shown


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys, contextlib, io\n"
        "from shardadam.cli import main\n"
        "for argv in (['--help'], ['train', '--help'], ['checkpoint', '--help'], ['checkpoint', 'import', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(argv)\n"
        "print([m for m in ('jax', 'flax', 'orbax', 'optax', 'numpy', 'pydantic') if m in sys.modules])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=250
    )
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_no_command(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
