"""docs/meshes.md, which `scripts/tables` writes: the collectives of one update on every kind of mesh."""

import jax
from meshes import KINDS, VARIANTS, compile_update, lay, row

INTRO = """\
# One update on every mesh

What one update of AdamW moves between eight devices, per kind of mesh, read from the compiled program: with gradients
that are reduced already, whole on each device as `jax.grad` under `jit` gives them, so that only what shardadam adds
shows. The parameters are float32, and of six small leaves ("data x expert" has two more, "fsdp alone" only the three
that FSDP splits); `tests/meshes.py` has their shapes and specs. Some dims divide by the devices, others do not, so
that natural, packed and whole leaves are among them.

*optax* is what `optax.adamw`'s state takes on each device where it follows the parameters, *state* what the plan's
takes. The last two columns count the all-gathers, one for each leaf that is split further than its parameter, and the
bytes that one device sends in all of them, by the ring algorithm; nothing else is sent, and never over `model`. With
*drop-in* (`shardadam.adamw` in a hand-written loop) it is the updates that are gathered, with *TrainState* the new
parameters.

The table is written by `./scripts/tables`. `tests/test_meshes.py` holds each row to what is compiled, and checks on
the way that params, mu and nu are to the bit those of optax on one device after three updates, that no parameter has
moved, that every device holds the bytes in the table, and that XLA has not reported an involuntary full
rematerialization.

| mesh | axis types | state over | optax | state | drop-in | TrainState |
|---|---|---|---|---|---|---|
"""

OUTRO = """
All axes that the state is split over must be of one type, and a dim never holds axes of two. So on mixed meshes where
parameters are sharded over `fsdp` or `expert`, the state is split over `data` only, and leaves that could only be
packed across both types stay whole.

With jax 0.12, and there only, `TrainState` on the HSDP mesh has parameters that are an ulp off in one leaf; mu and nu
are not.
"""


def page() -> str:
    """All of docs/meshes.md."""
    rows = []
    for variant in VARIANTS:
        laid = lay(variant)
        with jax.numpy_dtype_promotion("standard"):
            compiled = {kind: compile_update(laid, kind).compiled for kind in KINDS}
        rows.append(row(variant, laid.plan, compiled))
    return INTRO + "\n".join(rows) + "\n" + OUTRO
