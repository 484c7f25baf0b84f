import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardadam.trainer.config import ModelConfig
from shardadam.trainer.model import (
    Transformer,
    abstract_params,
    causal_attention,
    decay_mask,
    init_params,
    param_specs,
    rotate,
)

TINY = {"vocab_size": 257, "num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 32, "max_len": 16}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(257, size=(2, 12)), jnp.int32)


def build(**changes):
    model = Transformer(ModelConfig(**{**TINY, **changes}))
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    return params, jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))


@pytest.fixture(scope="module")
def plain():
    return build()


def test_a_later_token_changes_no_earlier_logits(plain):
    params, apply = plain
    before, after = apply(params, TOKENS), apply(params, TOKENS.at[:, 7].set(3))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.array_equal(before[:, 7:], after[:, 7:])


def test_untrained_logits_are_near_uniform(plain):
    params, apply = plain
    logits = apply(params, TOKENS)
    assert logits.shape == (2, 12, 257)
    assert logits.dtype == jnp.float32
    assert abs(float(jax.nn.log_softmax(logits).mean()) + np.log(257)) < 0.1


def test_layers_are_stacked_by_the_scan(plain):
    assert plain[0]["layers"]["mlp"]["up"]["kernel"].shape == (2, 16, 32)
    assert plain[0]["layers"]["attention"]["query"]["kernel"].shape == (2, 16, 4, 4)
    kernel = np.asarray(plain[0]["layers"]["mlp"]["up"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": "gelu", "tie_embeddings": False, "num_kv_heads": 2, "dtype": "bfloat16"},
        {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": True},
    ],
)
def test_variants_have_gradients_for_every_parameter(changes):
    params, apply = build(**changes)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {changes.get("param_dtype", "float32")}
    grads = jax.jit(jax.grad(lambda params: jax.nn.log_softmax(apply(params, TOKENS))[..., 0].mean()))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        assert np.any(g), path
    assert ("gate" in params["layers"]["mlp"]) == (changes.get("mlp") != "gelu")
    assert ("lm_head" in params) == (not changes.get("tie_embeddings", True))
    assert params["layers"]["attention"]["key"]["kernel"].shape[2] == changes.get("num_kv_heads", 4)


def test_rotary_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(np.tile(rng.normal(size=8), (1, 9, 1, 1)), jnp.float32) for _ in range(2))
    scores = jnp.einsum("bthd,bshd->ts", rotate(query, 100.0), rotate(key, 100.0))
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert len(set(np.round(scores[0], 3).tolist())) == 9


def test_attention_is_jaxs_own_in_float32():
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, 6, 4, 8)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(2, 6, 2, 8)), jnp.float32) for _ in range(2))
    expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    np.testing.assert_allclose(causal_attention(query, key, value), expected, rtol=1e-5, atol=1e-6)


class TestSpecs:
    def test_columns_in_rows_out_vocabulary_split(self):
        params = abstract_params(Transformer(ModelConfig(**TINY | {"vocab_size": 384, "tie_embeddings": False})))
        specs = param_specs(params, {"data": 4, "model": 2})
        assert specs["embedding"] == P("model")
        assert specs["lm_head"]["kernel"] == P(None, "model")
        attention, mlp = specs["layers"]["attention"], specs["layers"]["mlp"]
        assert {attention[name]["kernel"] for name in ("query", "key", "value")} == {P(None, None, "model")}
        assert attention["out"]["kernel"] == P(None, "model")
        assert {mlp[name]["kernel"] for name in ("gate", "up")} == {P(None, None, "model")}
        assert mlp["down"]["kernel"] == P(None, "model")
        assert specs["final_norm"]["scale"] == specs["layers"]["mlp_norm"]["scale"] == P()

    def test_a_dim_that_does_not_divide_stays_whole_and_is_told(self, caplog):
        params = abstract_params(Transformer(ModelConfig(**TINY | {"num_kv_heads": 2})))
        with caplog.at_level("WARNING", "shardadam.trainer"):
            specs = param_specs(params, {"data": 2, "model": 4})
        assert specs["embedding"] == P()
        assert specs["layers"]["attention"]["key"]["kernel"] == P()
        assert specs["layers"]["attention"]["query"]["kernel"] == P(None, None, "model")
        assert "`embedding`: dim 0 is 257, not divisible by 4 on axis 'model'" in caplog.text
        assert "`layers/attention/key/kernel`: dim 2 is 2" in caplog.text

    def test_without_a_model_axis_all_is_replicated(self):
        specs = param_specs(abstract_params(Transformer(ModelConfig(**TINY))), {"data": 8})
        assert set(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))) == {P()}


def test_norms_do_not_decay(plain):
    mask = decay_mask(plain[0])
    assert not mask["layers"]["mlp_norm"]["scale"]
    assert not mask["final_norm"]["scale"]
    assert mask["embedding"]
    assert mask["layers"]["attention"]["out"]["kernel"]
