"""`adam`, `adamw`, `nadam`, `nadamw`: the plan, the maths and the placement as optax transformations."""

import functools
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from shardadam.adam_rule import adam_rule
from shardadam.layout import LeafPlan
from shardadam.moments import Hyperparams
from shardadam.plan import Plan, path_name
from shardadam.rates import say_rate
from shardadam.sharded import place
from shardadam.sharding import constrain, split
from shardadam.transformation import ShardedTransformation, select, transformation


def scale_by_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | tuple[str, ...] = "data",
    plan: Plan | None = None,
) -> ShardedTransformation:
    """`adam` before its learning rate, as `optax.scale_by_adam`; the arguments, maths and errors are `adam`'s."""
    mu_dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)
    rule = adam_rule(Hyperparams(b1, b2, eps, eps_root), mu_dtype, nesterov=nesterov)
    return place(rule, mesh=mesh, axis_name=axis_name, plan=plan)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | tuple[str, ...] = "data",
    plan: Plan | None = None,
) -> ShardedTransformation:
    r"""`optax.adam`, with mu and nu partitioned over the device mesh.

    The maths, with t the number of the step (`shardadam.moments.update_leaf` has it in full)::

        mu_t   = b1 mu + (1 - b1) g              mu_hat = mu_t / (1 - b1^t)
        nu_t   = b2 nu + (1 - b2) |g|^2          nu_hat = nu_t / (1 - b2^t)
        update = -learning_rate mu_hat / (sqrt(nu_hat + eps_root) + eps)

    Under `jit` it gives params, mu and nu that are bit-identical to those of a jitted `optax.adam`.

    Args:
      learning_rate: a scalar, an array of shape (), or a schedule: a function of the step's number.
      b1: decay of mu.
      b2: decay of nu.
      eps: added to the denominator, outside of the square root.
      eps_root: added inside of the square root; needed to differentiate through the update.
      mu_dtype: dtype of mu; default: that of the parameters.
      nesterov: use Nesterov momentum (Dozat 2016).
      mesh: the mesh to split the state over. Default: the one `jax.set_mesh` made current; with none, or with one
        device, this is plain optax. On Explicit axes the parameters' specs are seen; on Auto axes they are not, the
        parameters are taken to be replicated, and a warning says so.
      axis_name: the mesh axis or axes to split the state over.
      plan: a plan from `make_plan`, for parameters that are sharded over Auto axes, or another layout or min_size. It
        has its own mesh and axes, so `axis_name` is not used; `mesh` is, where the plan was made without devices.

    Returns:
      An optax `GradientTransformationExtraArgs` whose state is optax's own: `ScaleByAdamState(count, mu, nu)` first in
      the chain's tuple. A leaf in the packed layout is held as (rows, lanes); see `LeafPlan`.

    Raises:
      ValueError: on `init` or `update`: a tree or a shape that the plan does not have, an axis that the mesh has not.

    Example:
      >>> tx = adam(3e-4, mesh=jax.make_mesh((1,), ("data",)))
      >>> params = {"kernel": jnp.ones((8, 128))}
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Kingma & Ba, Adam: A Method for Stochastic Optimization, 2014, Algorithm 1 (arXiv 1412.6980).
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019 (arXiv 1910.02054).
    """
    first = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, mesh=mesh, axis_name=axis_name, plan=plan)
    return _chain(learning_rate, first, optax.scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | tuple[str, ...] = "data",
    plan: Plan | None = None,
) -> ShardedTransformation:
    """`optax.adamw`, with mu and nu partitioned over the device mesh: `adam` plus decoupled weight decay.

    update = -learning_rate (mu_hat / (sqrt(nu_hat + eps_root) + eps) + weight_decay params)

    Args:
      learning_rate: as for `adam`, and so are all arguments that are not named here.
      b1: see `adam`.
      b2: see `adam`.
      eps: see `adam`.
      eps_root: see `adam`.
      mu_dtype: see `adam`.
      weight_decay: a scalar or a schedule; multiplied with the learning rate.
      mask: a tree of bools like the parameters, or a function of them that returns one: True where to decay.
      nesterov: see `adam`.
      mesh: see `adam`.
      axis_name: see `adam`.
      plan: see `adam`.

    References:
      Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2017 (arXiv 1711.05101).
    """
    first = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, mesh=mesh, axis_name=axis_name, plan=plan)
    rest = optax.scale_by_learning_rate(learning_rate)
    masked = _chain(learning_rate, first, optax.add_decayed_weights(weight_decay, mask), rest)
    if not callable(mask):
        return masked

    def update_fn(updates: Any, state: Any, params: Any = None, *, shards_of: Plan | None = None, **extra: Any) -> Any:
        if shards_of is None:
            return masked.update(updates, state, params, **extra)
        # A mask may go by the shape of a parameter: it is asked about that, not about the packed array.
        shaped = jax.tree_util.tree_map_with_path(lambda k, _: _abstract(shards_of.leaf(path_name(k))), params)
        decay = optax.add_decayed_weights(weight_decay, mask(shaped))
        chain = _chain(learning_rate, first, decay, rest)
        return chain.update(updates, state, params, shards_of=shards_of, **extra)

    return transformation(masked.init, update_fn, first.plan_of, takes_keep=True)


nadam = functools.partial(adam, nesterov=True)
nadam.__doc__ = "`adam` with Nesterov momentum, as `optax.nadam` (Dozat 2016)."

nadamw = functools.partial(adamw, nesterov=True)
nadamw.__doc__ = "`adamw` with Nesterov momentum, as `optax.nadamw` (Dozat 2016)."


def _chain(
    learning_rate: optax.ScalarOrSchedule, first: ShardedTransformation, *rest: optax.GradientTransformation
) -> ShardedTransformation:
    """`optax.chain` whose counters start on the mesh as well, so that the second step compiles nothing anew."""
    chain: Any = optax.chain(first, *rest)

    def init_fn(params: Any) -> Any:
        state = chain.init(params)
        on = split(first.plan_of(params, quiet=True))
        return state if on is None else jax.tree.map(lambda x: _on_mesh(x, on.mesh), state)

    def update_fn(updates: Any, state: Any, params: Any = None, *, keep: jax.Array | None = None, **extra: Any) -> Any:
        say_rate(learning_rate)
        updates, new_state = chain.update(updates, state, params, keep=keep, **extra)
        # What comes after Adam has counters, and may make an update of its zeros, as weight decay does.
        return select(keep, updates, 0), (new_state[0], *select(keep, new_state[1:], state[1:]))

    return transformation(init_fn, update_fn, first.plan_of, takes_keep=True)


def _on_mesh(x: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A fresh array of one device, replicated over the mesh; anything that has its place already, as it is."""
    placed = isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) or x.committed
    return x if placed else constrain(x, mesh, P())


def _abstract(leaf: LeafPlan) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
