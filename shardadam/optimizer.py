"""`adam`, `adamw`, `nadam`, `nadamw`: the plan, the maths and the placement as optax transformations."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from shardadam.layout import LeafPlan
from shardadam.moments import Hyperparams, Step, bias_corrections, safe_increment, update_leaf
from shardadam.placement import resolve_plan
from shardadam.plan import Plan, is_none, path_name
from shardadam.sharding import check_context, constrain, map_leaves, sharded_zeros
from shardadam.transformation import ShardedTransformation, select, transformation
from shardadam.update import check_shapes, keep_step, update_on_mesh


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
    hyperparams = Hyperparams(b1, b2, eps, eps_root)
    plan_of = functools.partial(resolve_plan, mesh=mesh, axis_name=axis_name, plan=plan)
    made_on: list[Mesh | AbstractMesh] = []  # The ambient mesh of init, if any: update must not come without one.

    def init_fn(params: Any) -> optax.ScaleByAdamState:
        on = _sharded(plan_of(params))
        if mesh is None and plan is None:
            made_on[:] = [] if on is None else [on.mesh]
        if on is None:
            count, zeros = jnp.zeros([], jnp.int32), _zeros
        else:
            map_leaves(_check_param, params, on)
            count, zeros = sharded_zeros((), jnp.int32, P(), on.mesh), functools.partial(_state_zeros, on)
        return optax.ScaleByAdamState(count=count, mu=zeros(params, mu_dtype), nu=zeros(params, None))

    def update_fn(
        updates: Any,
        state: optax.ScaleByAdamState,
        params: Any = None,
        *,
        shards_of: Plan | None = None,
        packed: bool = True,
        keep: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del extra
        on = shards_of or _sharded(plan_of(updates if params is None else params))
        if on is not None:
            check_context(on.mesh)
        elif made_on:
            raise ValueError(
                f"update: the state was made under jax.set_mesh({made_on[0]}), and there is no mesh now: the "
                "parameters would be moved; enter the mesh here as well, or give the optimizer mesh= or plan="
            )
        paths, grads, mu, nu, rebuild = _with_gradients(updates, state)
        count = safe_increment(jnp.asarray(state.count))
        if on is None:
            corrections = bias_corrections(count, hyperparams)
            rows = zip(grads, mu, nu, strict=True)
            steps = [
                keep_step(keep, update_leaf(*row, hyperparams, corrections, nesterov=nesterov), *row[1:])
                for row in rows
            ]
        else:
            leaves = tuple(on.leaf(path) for path in paths)
            sharded = tuple(shards_of is not None and (packed or leaf.layout != "packed") for leaf in leaves)
            check_shapes(paths, leaves, sharded, grads, mu, nu)
            steps = update_on_mesh(grads, mu, nu, count, keep, hyperparams, leaves, sharded, on.mesh, nesterov)
        count = select(keep, count, state.count)
        return rebuild(0, steps), optax.ScaleByAdamState(count=count, mu=rebuild(1, steps), nu=rebuild(2, steps))

    return transformation(init_fn, update_fn, plan_of, takes_keep=True)


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

    return transformation(masked.init, update_fn, first.plan_of, learning_rate=learning_rate, takes_keep=True)


nadam = functools.partial(adam, nesterov=True)
nadam.__doc__ = "`adam` with Nesterov momentum, as `optax.nadam` (Dozat 2016)."

nadamw = functools.partial(adamw, nesterov=True)
nadamw.__doc__ = "`adamw` with Nesterov momentum, as `optax.nadamw` (Dozat 2016)."


def _with_gradients(
    updates: Any, state: optax.ScaleByAdamState
) -> tuple[list[str], list[Any], list[Any], list[Any], Callable[[int, Sequence[Step]], Any]]:
    """(paths, grads, mu, nu) of the leaves that have a gradient, and what makes a tree of one field of their steps.

    A None gradient takes its moments with it, as in optax.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_none)
    moments = (treedef.flatten_up_to(tree) for tree in (state.mu, state.nu))
    rows = list(zip([path_name(k) for k, _ in keyed], [g for _, g in keyed], *moments, strict=True))
    present = [i for i, (_, g, _, _) in enumerate(rows) if g is not None]

    def rebuild(field: int, steps: Sequence[Step]) -> Any:
        whole: list[Any] = [None] * len(rows)
        for i, step in zip(present, steps, strict=True):
            whole[i] = step[field]
        return treedef.unflatten(whole)

    paths, grads, mu, nu = ([rows[i][column] for i in present] for column in range(4))
    return paths, grads, mu, nu, rebuild


def _chain(
    learning_rate: optax.ScalarOrSchedule, first: ShardedTransformation, *rest: optax.GradientTransformation
) -> ShardedTransformation:
    """`optax.chain` whose counters start on the mesh as well, so that the second step compiles nothing anew."""
    chain = optax.chain(first, *rest)

    def init_fn(params: Any) -> Any:
        state = chain.init(params)
        on = _sharded(first.plan_of(params, quiet=True))
        return state if on is None else jax.tree.map(lambda x: _on_mesh(x, on.mesh), state)

    def update_fn(updates: Any, state: Any, params: Any = None, *, keep: jax.Array | None = None, **extra: Any) -> Any:
        updates, new_state = chain.update(updates, state, params, keep=keep, **extra)
        # What comes after Adam has counters, and may make an update of its zeros, as weight decay does.
        return select(keep, updates, 0), (new_state[0], *select(keep, new_state[1:], state[1:]))

    return transformation(init_fn, update_fn, first.plan_of, learning_rate=learning_rate, takes_keep=True)


def _sharded(plan: Plan | None) -> Plan | None:
    """The plan where there is something to split; on no mesh, and on one device, plain optax does."""
    return None if plan is None or plan.mesh.size == 1 else plan


def _on_mesh(x: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A fresh array of one device, replicated over the mesh; anything that has its place already, as it is."""
    placed = isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) or x.committed
    return x if placed else constrain(x, mesh, P())


def _zeros(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(np.shape(x), dtype or jnp.result_type(x)), params)


def _state_zeros(plan: Plan, params: Any, dtype: Any) -> Any:
    """Zeros in the state's layout for every parameter."""
    return map_leaves(
        lambda leaf, x, path: sharded_zeros(leaf.state_shape, dtype or _dtype(x), leaf.state_spec, plan.mesh),
        params,
        plan,
    )


def _dtype(x: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(jnp.result_type(x))


def _check_param(leaf: LeafPlan, x: Any, path: str) -> None:
    got, dtype = np.shape(x), _dtype(x)
    # Wider ones are masters of the plan's parameters.
    if got != leaf.shape or jnp.promote_types(dtype, leaf.dtype) != dtype:
        raise ValueError(
            f"`{path}`: the parameter is {dtype}{list(got)}, the plan has {leaf.dtype}{list(leaf.shape)}; make the "
            "plan from these parameters"
        )


def _abstract(leaf: LeafPlan) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
