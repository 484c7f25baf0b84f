"""Measures every variant of the optimizer step on as many simulated devices as XLA_FLAGS makes; `update.py` runs it.

Takes its options as one JSON object, prints one line of JSON per tree.
"""

import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import TREES, tiny

import shardadam
from shardadam.plan import DEFAULT_MIN_SIZE

VISIT_SECONDS = 0.3  # A visit to a variant repeats its step for about so long.
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Variant(NamedTuple):
    """One way to do a step. `rest` is all that lives between steps but the parameters, which the variants share."""

    init: Callable[[Any], Any]  # params -> rest
    step: Callable[[Any, Any, Any], Any]  # params, rest, grads -> params, rest
    out_shardings: Any = None
    opt_state: Callable[[Any], Any] = lambda rest: rest

    def jit(self) -> Any:
        kwargs = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        return jax.jit(self.step, donate_argnums=(0, 1), **kwargs)


def variants(params: Any, mesh: Mesh, min_size: int) -> dict[str, Variant]:
    """All that is compared, by name; leaves under `min_size` stay replicated in each of the sharded ones."""
    plans = {
        layout: shardadam.make_plan(params, mesh, layout=layout, min_size=min_size) for layout in ("natural", "packed")
    }
    return {
        "replicated optax": replicated(mesh),
        "hand-placed optax": hand_placed(params, mesh, min_size),
        **{f"drop-in {layout}": drop_in(plan) for layout, plan in plans.items()},
        **{f"TrainState {layout}": in_train_state(plan) for layout, plan in plans.items()},
    }


def optax_step(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], Any]:
    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def replicated(mesh: Mesh) -> Variant:
    tx = optax.adam(1e-3)
    return Variant(jax.jit(tx.init, out_shardings=NamedSharding(mesh, P())), optax_step(tx))


def hand_placed(params: Any, mesh: Mesh, min_size: int) -> Variant:
    """What people write today: the moments on the first dim that divides, the parameters pinned to be replicated."""

    def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
        divides = [dim for dim, length in enumerate(x.shape) if length % mesh.size == 0]
        split = divides and x.size >= min_size
        return NamedSharding(mesh, P(*[None] * divides[0], "data") if split else P())

    tx = optax.adam(1e-3)
    shardings = jax.tree.map(place, jax.eval_shape(tx.init, params))
    whole = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
    return Variant(jax.jit(tx.init, out_shardings=shardings), optax_step(tx), (whole, shardings))


def drop_in(plan: shardadam.Plan) -> Variant:
    tx = shardadam.adam(1e-3, plan=plan)
    return Variant(tx.init, optax_step(tx))


def in_train_state(plan: shardadam.Plan) -> Variant:
    tx = shardadam.adam(1e-3, plan=plan)

    def init(params: Any) -> Any:
        return shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan).replace(params=None)

    def step(params: Any, state: Any, grads: Any) -> Any:
        state = state.replace(params=params).apply_gradients(grads=grads)
        return state.params, state.replace(params=None)

    return Variant(init, step, opt_state=lambda state: state.opt_state)


def arrays(shapes: Any, mesh: Mesh, scale: float) -> Any:
    """Replicated arrays of numbers between -scale and scale; each device has its own copy."""

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        index = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
        return scale * (2.0 * (index * 0.6180339 % 1.0) - 1.0)

    def make() -> Any:
        return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))

    return jax.jit(make, out_shardings=NamedSharding(mesh, P()))()


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bytes_per_device(tree: Any) -> int:
    """Bytes of the tree's shards on the fullest device."""
    held = dict.fromkeys(jax.devices(), 0)
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{op: {count, bytes of its operands on one device}} in a compiled program's text."""
    sizes, found = {}, {}
    for line in hlo.splitlines():
        if line and not line.startswith(" "):
            sizes = {}  # A new computation: names are its own.
        match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line)
        if not match:
            continue
        name, shape, op, operands = match.groups()
        sizes[name] = shape_bytes(shape)
        op = op.removesuffix("-start")
        if op in COLLECTIVES:
            entry = found.setdefault(op, {"count": 0, "bytes": 0})
            entry["count"] += 1
            entry["bytes"] += sum(sizes[x] for x in re.findall(r"%([\w.-]+)", operands.split(")")[0]))
    return found


def shape_bytes(shape: str) -> int:
    """Bytes of `f32[8,4]{1,0}` or of a tuple of such."""
    parts = re.findall(r"([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]", shape)
    return sum(
        (int(bits) // 8 if bits else 1) * int(np.prod([int(dim) for dim in dims.split(",") if dim]))
        for _, bits, dims in parts
    )


def signature(variant: Variant, params: Any) -> tuple[tuple[Any, Any, Any], int]:
    """The step's abstract arguments, and the bytes of mu, nu and count per device, from a state that is made for it."""
    rest = variant.init(params)
    return (abstract(params), abstract(rest), abstract(params)), bytes_per_device(variant.opt_state(rest))


def compile_step(variant: Variant, arguments: Any, seconds: list[float]) -> Any:
    """The compiled step, from abstract arguments: no large array comes or goes while `seconds` is added to."""
    start = time.perf_counter()
    compiled = variant.jit().lower(*arguments).compile()
    seconds.append(time.perf_counter() - start)
    return compiled


def turns(names: list[str], rounds: int) -> Iterator[str]:
    """Every name once per round; each round begins with another, so that the machine's moods hit all alike."""
    for i in range(rounds):
        shift = i % len(names)
        yield from names[shift:] + names[:shift]


def time_steps(programs: dict[str, Any], to_time: dict[str, Variant], params: Any, grads: Any, rounds: int) -> Any:
    """{name: seconds of a step} and {name: CPU seconds of a step, over all threads}, one per round.

    The state is made anew at each visit: the states of all variants at once would not fit.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in programs}
    for name in turns(list(programs), rounds):
        rest = to_time[name].init(params)
        visit, spent = [], 0.0
        while len(visit) < 2 or (spent < VISIT_SECONDS and len(visit) < 20):
            start, cpu_start = time.perf_counter(), time.process_time()
            params, rest = jax.block_until_ready(programs[name](params, rest, grads))
            visit.append((time.perf_counter() - start, time.process_time() - cpu_start))
            spent += visit[-1][0]
        wall, cpu = zip(*visit[1:], strict=True)  # The first one warms up.
        seconds[name].append(statistics.median(wall))
        cpu_seconds[name].append(statistics.median(cpu))
        del rest
    return seconds, cpu_seconds


def time_dispatch(tree: Any, mesh: Mesh, rounds: int, calls: int) -> dict[str, list[float]]:
    """{name: CPU seconds that the calling thread spends until the call returns, one median per round}.

    Not wall time: the devices start while the call is still at work, and on few cores they take its time away.
    """
    params, grads = arrays(tiny(tree), mesh, 1.0), arrays(tiny(tree), mesh, 1.0)
    programs, rests, seconds = {}, {}, {}
    for name, variant in variants(params, mesh, min_size=0).items():
        programs[name], rests[name], seconds[name] = variant.jit(), variant.init(params), []
    for name in turns(list(programs), rounds):
        visit = []
        for _ in range(calls):
            start = time.thread_time()
            out = programs[name](params, rests[name], grads)
            visit.append(time.thread_time() - start)
            params, rests[name] = jax.block_until_ready(out)
        seconds[name].append(statistics.median(visit[2:]))
    return seconds


def exactly(compiled: Any, state_bytes: int) -> dict[str, Any]:
    """What no clock has to say about a step."""
    temp = compiled.memory_analysis().temp_size_in_bytes
    return {"state_bytes": state_bytes, "temp_bytes": temp, "collectives": collectives(compiled.as_text())}


def paired(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """How many times as long as `base`: the median over rounds of the ratio within a round."""
    return statistics.median(x / y for x, y in zip(seconds[name], seconds[base], strict=True))


def measure(tree: Any, mesh: Mesh, options: dict[str, Any]) -> dict[str, Any]:
    """All figures of all variants for one tree."""
    params, grads = arrays(tree, mesh, 1.0), arrays(tree, mesh, 1e-2)
    to_time = variants(params, mesh, DEFAULT_MIN_SIZE)
    signatures = {name: signature(variant, params) for name, variant in to_time.items()}
    del params, grads  # Their memory, and the states', is given back before anything is timed.
    gc.collect()
    programs, compiling = {}, {name: [] for name in to_time}
    if not options["small"]:  # The process's first compilation loads the compiler.
        compile_step(to_time["replicated optax"], signatures["replicated optax"][0], [])
    for name in turns(list(to_time), options["compile_rounds"]):
        if not options["small"]:
            jax.clear_caches()  # Traces of inner functions too: every compilation starts from nothing.
        programs[name] = compile_step(to_time[name], signatures[name][0], compiling[name])
    exact = {name: exactly(programs[name], state_bytes) for name, (_, state_bytes) in signatures.items()}
    params, grads = arrays(tree, mesh, 1.0), arrays(tree, mesh, 1e-2)
    seconds, cpu_seconds = time_steps(programs, to_time, params, grads, options["rounds"])
    del params, grads, programs
    gc.collect()
    dispatching = time_dispatch(tree, mesh, options["dispatch_rounds"], options["dispatch_calls"])

    def figures(name: str) -> dict[str, Any]:
        kinds = (("step", seconds), ("cpu", cpu_seconds), ("compile", compiling), ("dispatch", dispatching))
        times = {f"{kind}_seconds": {"median": statistics.median(x[name]), "min": min(x[name])} for kind, x in kinds}
        bases = ("replicated optax", "hand-placed optax")
        ratios = {f"{kind}_vs_{base.split()[0]}": paired(x, name, base) for kind, x in kinds for base in bases}
        return times | ratios | exact[name]

    return {name: figures(name) for name in to_time}


def main() -> None:
    options = json.loads(sys.argv[1])
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("data",))
    for name in options["trees"]:
        measured = measure(TREES[name](small=options["small"]), mesh, options)
        print(json.dumps({"tree": name, "devices": len(devices), "variants": measured}), flush=True)


if __name__ == "__main__":
    main()
