"""Seals a step that was found without a seal: from then on it counts as saved, as it is."""

import logging
from typing import Any

from shardadam.checkpoint.digest import host_digest
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.reading import saved_leaves
from shardadam.checkpoint.seal import Seal, SealedLeaf
from shardadam.checkpoint.sealing import is_count, write_seal
from shardadam.checkpoint.slots import check_names
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.together import on_process_zero
from shardadam.checkpoint.verify import stored_leaves

log = logging.getLogger("shardadam.checkpoint")


def adopt(steps: Steps, step: int, *, run_id: str = "", config: Any = None, origin: str = "adopted") -> Seal:
    """Seals a committed step with the digests of what it holds now. All processes call this.

    That it is undamaged is the caller's word: damage from before is sealed with the rest.

    Args:
      steps: of the directory.
      step: which.
      run_id: of who adopts it.
      config: anything that JSON holds, to be kept in the seal.
      origin: how the step came to be, for people.

    Returns:
      The seal.

    Raises:
      CheckpointError: the step has a seal, or is not committed, or its arrays cannot be read.
      ValueError: two of its leaves would have one name in a seal.
    """

    def digest() -> dict[str, Any]:
        if step not in steps.unsealed():
            known = "is sealed already" if step in steps.seals() else f"is not committed in {steps.directory}"
            raise CheckpointError(f"step {step}: {known}, so it cannot be adopted; without a seal: {steps.unsealed()}")
        leaves, count = {}, None
        check_names(saved_leaves(steps.path(step)))
        for leaf, x in stored_leaves(steps.path(step)):
            found = host_digest(x, leaf.path)
            leaves[leaf.path] = [found.text, found.num_nonfinite, list(leaf.shape), leaf.dtype.name]
            count = int(x) if is_count(leaf.names, leaf.shape) else count
        return {"leaves": leaves, "count": count}

    # Process 0 reads alone: there are no devices to share the leaves out to by a plan.
    found = on_process_zero(steps.key("adopt"), digest)
    leaves = {
        path: SealedLeaf(text, bad, tuple(shape), dtype) for path, (text, bad, shape, dtype) in found["leaves"].items()
    }
    draft = Seal(step=step, files={}, leaves=leaves, count=found["count"], config=config, run_id=run_id, origin=origin)
    seal = write_seal(steps, draft)
    log.info("step %d of %s: %s, %d leaves sealed as they are", step, steps.directory, origin, len(leaves))
    return seal
