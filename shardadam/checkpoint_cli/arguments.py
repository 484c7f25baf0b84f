"""What each `shardadam checkpoint` command takes; tyro reads the docstrings."""

import dataclasses
from typing import Annotated, Literal

import tyro

Form = Literal["train_state", "opt_state", "nnx", "params"]
Optimizer = Literal["adam", "adamw", "nadam", "nadamw"]
Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Directory = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
Keys = tyro.conf.UseAppendAction[tuple[Annotated[str, tyro.conf.arg(metavar="KEY")], ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    """What all commands take."""

    json: bool = False
    """Prints JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Conversion(_Command):
    """What both conversions take."""

    to: Form | None = None
    """The form to write; None: the form that is found."""
    optimizer: Optimizer = "adam"
    """What an nnx optimizer was made of."""
    drop: Keys = ()
    """Leaves this part out; may be given several times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import(_Conversion):
    """Makes a checkpoint of optax's Adam into one that shardadam.Checkpointer restores, on any mesh."""

    source: Source
    """What plain Orbax, Flax or nnx.state saved: a tree, a step with items, or a directory of steps."""
    directory: Directory
    """The Checkpointer's directory."""
    step: int | None = None
    """Which step of a directory of steps; None: the latest."""
    params: str | None = None
    """The keypath of the parameters, where the form is not known."""
    opt_state: str | None = None
    """The keypath of optax's state, where the form is not known."""
    allow_nonfinite: bool = False
    """Imports a state though it has NaN or infinities in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(_Conversion):
    """Writes a step as a plain Orbax tree, for optax, Flax or nnx without shardadam; or the parameters alone."""

    source: Source
    """The Checkpointer's directory, or that of one step."""
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The directory to make."""
    step: int | None = None
    """Which step; None: the latest."""
    dtype: str | None = None
    """Of the parameters, for serving, such as bfloat16; only with --to params."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(_Command):
    """Lists the steps of a directory: sealed or not, when and by which run they were saved, and their bytes."""

    directory: Directory
    """The Checkpointer's directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show(_Command):
    """Shows what a step holds: form, optimizer, what its seal says, and each leaf's dtype, shape and bytes."""

    step: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """A step's directory such as runs/a/checkpoints/500, a plain Orbax tree, or a directory of steps: its latest."""
    digests: bool = False
    """Reads all leaves, and shows their digests and how many elements are NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff(_Command):
    """Compares two checkpoints by the bits of their leaves. Exit code 1 if they differ."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """As STEP of `show`."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """As STEP of `show`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(_Command):
    """Compares every byte of a step with its seal. Exit code 1 if it is damaged or has no seal."""

    step: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """A step's directory, or the Checkpointer's: its newest step."""
    all: bool = False
    """Verifies all steps of a Checkpointer's directory."""
    digests: bool = False
    """Compares the digests of the leaves, too: those of what was in memory when the step was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adopt(_Command):
    """Seals a step that plain Orbax or an older shardadam wrote, as it is now: from then on it counts as saved."""

    directory: Directory
    """The Checkpointer's directory."""
    step: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """The step's number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(_Command):
    """Deletes the oldest sealed steps. Damaged and unsealed ones stay, and so do the newest two, whatever is asked."""

    directory: Directory
    """The Checkpointer's directory."""
    keep: int
    """How many of the newest to keep: 2 or more."""
    keep_period: int | None = None
    """Steps that are multiples of it are kept, too."""
    dry_run: bool = False
    """Only says what would be deleted."""
