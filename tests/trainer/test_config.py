import pytest

from shardadam.trainer.config import ConfigError, TrainConfig, dump_config, load_config, parse_config


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_yaml_round_trip(tmp_path):
    config = parse_config({"name": "a", "steps": 7, "model": {"num_kv_heads": 2, "mlp": "gelu"}})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "# nothing\n")) == TrainConfig()


def test_a_float_that_yaml_reads_as_a_string_is_coerced(tmp_path):
    assert load_config(write(tmp_path, "optimizer: {learning_rate: 6e-4}")).optimizer.learning_rate == 6e-4


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"stepz": 4}, ["unknown field 'stepz'", "did you mean 'steps'"]),
        ({"model": {"num_layer": 4}}, ["unknown field 'model.num_layer'", "did you mean 'model.num_layers'"]),
        ({"learning_rat": 1}, ["unknown field 'learning_rat'", "did you mean 'optimizer.learning_rate'"]),
        ({"data": {"xyzzy": 4}}, ["unknown field 'data.xyzzy'", "the fields are data.files, data.tokens"]),
        ({"model": 3}, ["'model' is 3", "wanted a mapping"]),
        ([1], ["'the file' is [1]", "wanted a mapping"]),
        ({"steps": "many"}, ["'steps' is 'many'", "valid integer"]),
        ({"steps": -1}, ["'steps' is -1", "greater than or equal to 0"]),
        ({"batch_size": 0}, ["'batch_size' is 0", "greater than or equal to 1"]),
        ({"optimizer": {"b1": 1.0}}, ["'optimizer.b1' is 1.0", "less than 1"]),
        ({"optimizer": {"learning_rate": 0}}, ["'optimizer.learning_rate' is 0", "greater than 0"]),
        ({"model": {"mlp": "relu"}}, ["'model.mlp' is 'relu'", "'swiglu' or 'gelu'"]),
        ({"model": {"num_kv_heads": 0}}, ["'model.num_kv_heads' is 0", "greater than or equal to 1"]),
        ({"model": {"d_model": 30}}, ["'model.d_model' is 30, not divisible by 'model.num_heads', 4"]),
        ({"model": {"d_model": 12}}, ["is 3; rotary positions need an even number"]),
        ({"model": {"num_kv_heads": 3}}, ["'model.num_kv_heads' is 3, which does not divide 'model.num_heads', 4"]),
        ({"model": {"vocab_size": 256}}, ["'model.vocab_size' is 256", "need 257"]),
        ({"data": {"files": "a", "tokens": "b"}}, ["'data.files' and 'data.tokens' are both set"]),
        ({"optimizer": {"warmup_steps": 200}}, ["'optimizer.warmup_steps' is 200", "'optimizer.decay_steps', 200"]),
        ({"name": "a/b"}, ["'name' is 'a/b'", "one directory"]),
        ({"name": ""}, ["'name' is ''"]),
        ({"name": ".."}, ["'name' is '..'"]),
    ],
)
def test_what_is_wrong_is_named(raw, parts):
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "some.yaml")
    assert str(caught.value).startswith("some.yaml: ")
    for part in parts:
        assert part in str(caught.value)


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"'steps' is 'x'.*; 'seed' is -1"):
        parse_config({"steps": "x", "seed": -1})


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml': cannot read it \(No such file or directory\)"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_file_that_is_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "a: [1"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml': cannot read it"):
        load_config(binary)
