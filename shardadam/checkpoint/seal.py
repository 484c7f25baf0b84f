"""The `Seal` of a saved step: what every file and every leaf of it is, in one small file beside the steps."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax.numpy as jnp

from shardadam.checkpoint.errors import CheckpointError
from shardadam.plan import Plan

FORMAT = 1


class SealedFile(NamedTuple):
    """What a file of a step holds."""

    size: int
    sha256: str


class SealedLeaf(NamedTuple):
    """What a leaf of a step holds: its digest, which is that of the same leaf on any devices; logical shape, dtype."""

    digest: str
    num_nonfinite: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in memory, of dtypes under a byte one an element."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seal:
    """Written once a step is committed; a step without one does not count as saved.

    Attributes:
      step: the step's number, which is its directory's name.
      files: every file of the step, by its path in the step's directory.
      leaves: every leaf of the state, by its keypath, names joined with "/".
      count: Adam's, if the state has one.
      plan: how the moments lay in memory, for people: on disk they have their parameters' shapes.
      config: what the run gave to be kept with its checkpoints; anything that JSON holds.
      versions: of what wrote the step.
      run_id: the run's name.
      num_processes: how many wrote the step.
      sealed_at: when, in UTC.
      origin: "saved" by this library; "adopted": it was there without a seal, and its digests are those of what was
        found, not of what had been in memory.
    """

    step: int
    files: Mapping[str, SealedFile]
    leaves: Mapping[str, SealedLeaf]
    count: int | None = None
    plan: Mapping[str, Any] | None = None
    config: Any = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    run_id: str = ""
    num_processes: int = 1
    sealed_at: str = ""
    origin: str = "saved"

    @property
    def num_nonfinite(self) -> int:
        """How many elements of the state are NaN or infinite."""
        return sum(leaf.num_nonfinite for leaf in self.leaves.values())

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files.values())

    def to_text(self) -> str:
        """JSON with a checksum of itself. Inverse of `from_text`."""
        body = dataclasses.asdict(self)
        body["files"] = {path: file._asdict() for path, file in sorted(self.files.items())}
        body["leaves"] = {path: leaf._asdict() for path, leaf in self.leaves.items()}
        return _signed(body, FORMAT)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads a seal, every bit of which must be as it was written.

        Raises:
          CheckpointError: it is not a seal, is damaged, or is of a format that this version does not know.
        """
        try:
            envelope = json.loads(text)
            whole = _signed(envelope["seal"], envelope["format"]) == text
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"the seal is damaged: it cannot be read ({type(error).__name__}: {error})") from None
        if not whole:
            raise CheckpointError("the seal is damaged: its checksum is not that of what it holds")
        if envelope["format"] != FORMAT:
            raise CheckpointError(f"the seal has format {envelope['format']}, wanted {FORMAT}: upgrade shardadam")
        try:
            return cls._from_body(envelope["seal"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Its checksum is right: whoever can write seals can sum them.
            raise CheckpointError(f"the seal is none of ours: {type(error).__name__}: {error}") from None

    @classmethod
    def _from_body(cls, body: Any) -> Self:
        """Raises TypeError, KeyError or AttributeError where the body is not as `to_text` makes it."""
        files = {path: SealedFile(**file) for path, file in body["files"].items()}
        leaves = {path: SealedLeaf(**(leaf | {"shape": tuple(leaf["shape"])})) for path, leaf in body["leaves"].items()}
        seal = cls(**(body | {"files": files, "leaves": leaves}))
        numbers = [seal.step, *(file.size for file in files.values())]
        numbers += [number for leaf in leaves.values() for number in (leaf.num_nonfinite, *leaf.shape)]
        texts = [seal.run_id, seal.sealed_at, seal.origin, *(file.sha256 for file in files.values())]
        texts += [text for leaf in leaves.values() for text in (leaf.digest, leaf.dtype)]
        for kind, values in ((int, numbers), (str, texts)):
            if wrong := [value for value in values if type(value) is not kind]:
                raise TypeError(f"got {wrong[0]!r}, wanted {kind.__name__}")
        return seal


def described_plan(plan: Plan | None) -> dict[str, Any] | None:
    """A plan as a seal keeps it: the mesh, the axes that the state was split over, and each leaf's layout."""
    if plan is None:
        return None
    return {
        "mesh": {axis: int(size) for axis, size in plan.mesh.shape.items()},
        "axis_names": list(plan.axis_names),
        "leaves": {path: {"layout": leaf.layout, "spec": str(leaf.state_spec)} for path, leaf in plan.items},
    }


def _signed(body: Mapping[str, Any], number: int) -> str:
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({"format": number, "sha256": checksum, "seal": body}, indent=1) + "\n"
