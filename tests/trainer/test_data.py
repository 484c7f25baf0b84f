import bz2
import functools

import jax
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import tiny_config

from shardadam.trainer.config import ConfigError, DataConfig, parse_config
from shardadam.trainer.corpus import EOS, load_corpus
from shardadam.trainer.data import (
    IGNORE,
    bz2_bits_per_byte,
    check_batch,
    eval_batches,
    place_batch,
    place_train_batch,
    train_rows,
)


@pytest.fixture
def tiny(tmp_path):
    return functools.partial(tiny_config, tmp_path)


@pytest.fixture
def config(tiny):
    return tiny()


@pytest.fixture
def corpus(config):
    return load_corpus(config.data, vocab_size=384, window=17)


def rows(corpus, config, step):
    return train_rows(corpus.train, config, step, slice(None))


def token_files(tmp_path, *arrays):
    for i, array in enumerate(arrays):
        array.tofile(tmp_path / f"{i}.bin")
    return str(tmp_path / "*.bin")


class TestTrainRows:
    def test_pure_in_seed_and_step(self, corpus, config, tiny):
        for step in (0, 1, 10**7):
            first, again = rows(corpus, config, step), rows(corpus, config, step)
            np.testing.assert_array_equal(first.inputs, again.inputs)
        assert not np.array_equal(rows(corpus, config, 0).inputs, rows(corpus, config, 1).inputs)
        assert not np.array_equal(rows(corpus, config, 0).inputs, rows(corpus, tiny(seed=1), 0).inputs)

    def test_a_process_makes_the_rows_of_the_global_batch(self, corpus, config):
        whole = rows(corpus, config, 3)
        for part in (slice(0, 4), slice(4, 8), slice(7, 8)):
            mine = train_rows(corpus.train, config, 3, part)
            np.testing.assert_array_equal(mine.inputs, whole.inputs[part])
            np.testing.assert_array_equal(mine.targets, whole.targets[part])

    def test_targets_are_the_next_tokens_of_the_text(self, corpus, config):
        batch = rows(corpus, config, 0)
        assert batch.inputs.shape == batch.targets.shape == (8, 16)
        assert batch.inputs.dtype == np.int32
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        text = corpus.train.segments[0].astype(np.int32).tobytes()
        for row in batch.inputs:
            assert row.tobytes() in text

    def test_no_window_spans_two_token_files(self, tmp_path, tiny):
        glob = token_files(tmp_path, *(np.full(40 + i, i, np.uint16) for i in range(8)))
        config = tiny(data={"files": None, "tokens": glob})
        corpus = load_corpus(config.data, vocab_size=384, window=17)
        seen = {tuple(np.unique(row)) for step in range(8) for row in rows(corpus, config, step).inputs}
        assert len(corpus.train.segments) > 2
        assert seen == {(int(segment[0]),) for segment in corpus.train.segments}

    def test_the_last_window_of_a_segment_is_drawn_too(self, tmp_path, tiny):
        config = tiny(data={"files": None, "tokens": token_files(tmp_path, *[np.arange(18, dtype=np.uint16)] * 2)})
        corpus = load_corpus(config.data, vocab_size=384, window=17)
        assert {int(row[0]) for step in range(8) for row in rows(corpus, config, step).inputs} == {0, 1}

    @pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "model": 2}, {"data": 1}])
    def test_on_the_mesh(self, corpus, config, sizes):
        sharding = NamedSharding(make_mesh(sizes), P("data"))
        placed, whole = place_train_batch(corpus.train, config, 2, sharding), rows(corpus, config, 2)
        assert placed.inputs.sharding == placed.targets.sharding == sharding
        assert placed.inputs.addressable_shards[0].data.shape == (8 // sizes["data"], 16)
        np.testing.assert_array_equal(jax.device_get(placed.inputs), whole.inputs)
        np.testing.assert_array_equal(jax.device_get(placed.targets), whole.targets)


class TestEval:
    def test_every_token_is_a_target_once(self, corpus, config):
        batches = list(eval_batches(corpus.eval, config))
        assert {batch.targets.shape for batch in batches} == {(8, 16)}
        targets = np.concatenate([batch.targets.ravel() for batch in batches])
        np.testing.assert_array_equal(targets[targets != IGNORE], corpus.eval.segments[0][1:501])

    def test_inputs_come_before_their_targets(self, corpus, config):
        before = np.concatenate([b.inputs[b.targets != IGNORE] for b in eval_batches(corpus.eval, config)])
        np.testing.assert_array_equal(before, corpus.eval.segments[0][:500])

    def test_the_whole_text_where_it_is_short(self, corpus, tiny):
        batches = eval_batches(corpus.eval, tiny(data={"eval_tokens": 10**9}))
        assert sum((batch.targets != IGNORE).sum() for batch in batches) == len(corpus.eval) - 1

    def test_bz2_sees_the_same_bytes(self, corpus, config):
        tokens = corpus.eval.segments[0][1:501]
        text = bytes(int(t) for t in tokens if t != EOS)
        assert bz2_bits_per_byte(corpus.eval, config) == (8 * len(bz2.compress(text, 9)) / len(text), len(text))

    def test_on_the_mesh(self, corpus, config):
        batch = next(eval_batches(corpus.eval, config))
        placed = place_batch(batch, NamedSharding(make_mesh({"data": 8}), P("data")))
        np.testing.assert_array_equal(jax.device_get(placed.targets), batch.targets)


class TestCorpus:
    def test_bytes_and_end_of_document(self, tmp_path):
        (tmp_path / "a").write_bytes(b"x" * 30)
        (tmp_path / "b").write_bytes(bytes(range(256)))
        corpus = load_corpus(DataConfig(files=str(tmp_path / "?")), vocab_size=257, window=17)
        both = sorted([corpus.train.segments[0].tolist(), corpus.eval.segments[0].tolist()], key=len)
        assert both == [[EOS, *b"x" * 30, EOS], [EOS, *range(256), EOS]]

    def test_a_file_stays_on_its_side_when_others_come(self, tmp_path):
        def names(glob):
            corpus = load_corpus(DataConfig(tokens=glob, eval_fraction=0.3), vocab_size=9, window=2)
            return {name.rsplit("/")[-1] for name in corpus.eval.names}

        arrays = [np.full(64, i % 7, np.uint16) for i in range(20)]
        before = names(token_files(tmp_path, *arrays))
        np.full(64, 8, np.uint16).tofile(tmp_path / "20.bin")
        assert 1 < len(before) < 19
        assert names(str(tmp_path / "*.bin")) - {"20.bin"} == before

    def test_a_single_file_is_cut_in_two(self, tmp_path):
        (tmp_path / "a").write_bytes(bytes(range(100)))
        corpus = load_corpus(DataConfig(files=str(tmp_path / "a"), eval_fraction=0.2), vocab_size=257, window=17)
        assert corpus.train.segments[0].tolist() == [EOS, *range(80), EOS]
        assert corpus.eval.segments[0].tolist() == [EOS, *range(80, 100), EOS]

    def test_sha256_tells_content_and_names_not_places(self, tmp_path):
        def sha256(directory, name, text):
            (tmp_path / directory).mkdir()
            (tmp_path / directory / name).write_text(text)
            return load_corpus(DataConfig(files=str(tmp_path / directory / "*")), vocab_size=257, window=2).sha256

        first = sha256("1", "a", "text" * 20)
        assert first == sha256("2", "a", "text" * 20)
        assert first != sha256("3", "a", "Text" * 20)
        assert first != sha256("4", "b", "text" * 20)

    def test_the_standard_library(self):
        corpus = load_corpus(DataConfig(), vocab_size=384, window=257)
        again = load_corpus(DataConfig(), vocab_size=384, window=257)
        assert len(corpus.train) > 5_000_000
        assert 0.01 < len(corpus.eval) / (len(corpus.train) + len(corpus.eval)) < 0.15
        assert corpus.sha256 == again.sha256
        assert corpus.bytes_per_token

    @pytest.mark.parametrize("dtype", ["uint16", "uint32"])
    def test_token_files_are_mapped_not_read(self, tmp_path, dtype):
        glob = token_files(tmp_path, *(np.arange(100, dtype=dtype) + i for i in range(3)))
        corpus = load_corpus(DataConfig(tokens=glob, token_dtype=dtype), vocab_size=200, window=17)
        assert all(isinstance(segment, np.memmap) for segment in corpus.train.segments)
        assert not corpus.bytes_per_token
        assert corpus.train.window(0, 2, 3).tolist() == corpus.train.segments[0][2:5].tolist()


class TestErrors:
    def test_a_glob_without_files(self, tmp_path):
        with pytest.raises(ConfigError, match=r"'data.files' is '.*\*.txt': no file matches"):
            load_corpus(DataConfig(files=f"{tmp_path}/*.txt"), vocab_size=384, window=17)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"'data.tokens' is '.*nowhere.bin': no such file"):
            load_corpus(DataConfig(tokens=f"{tmp_path}/nowhere.bin"), vocab_size=384, window=17)

    def test_too_little_text(self, tmp_path):
        (tmp_path / "a").write_bytes(b"x" * 100)
        with pytest.raises(ConfigError, match=r"longest eval text has 7 tokens, one window needs 17"):
            load_corpus(DataConfig(files=str(tmp_path / "a")), vocab_size=384, window=17)

    def test_a_token_file_of_another_dtype(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(b"x" * 101)
        with pytest.raises(ConfigError, match=r"a.bin' has 101 bytes, not a positive multiple of 2"):
            load_corpus(DataConfig(tokens=f"{tmp_path}/a.bin"), vocab_size=384, window=17)
        (tmp_path / "a.bin").write_bytes(b"")
        with pytest.raises(ConfigError, match="has 0 bytes"):
            load_corpus(DataConfig(tokens=f"{tmp_path}/a.bin"), vocab_size=384, window=17)

    def test_a_token_beyond_the_vocabulary(self, tmp_path, tiny):
        config = tiny(data={"files": None, "tokens": token_files(tmp_path, *[np.full(99, 384, np.uint16)] * 2)})
        corpus = load_corpus(config.data, vocab_size=384, window=17)
        with pytest.raises(ConfigError, match=r"0|1.bin': token id 384 is not below 'model.vocab_size', 384"):
            rows(corpus, config, 0)

    def test_a_batch_that_the_mesh_does_not_divide(self):
        check_batch(parse_config({"batch_size": 16}), 8)
        with pytest.raises(ConfigError, match=r"'batch_size' is 12, not divisible by 8, .*'data' axis; use 8"):
            check_batch(parse_config({"batch_size": 12}), 8)
