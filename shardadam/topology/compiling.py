"""`compile_for`: one case, compiled in a process of its own, for hardware that is not here."""

import gzip
import hashlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shardadam.hlo import CollectiveOp, Memory, collectives
from shardadam.topology.accelerators import GPU_ENVIRONMENT, TPU_ENVIRONMENT
from shardadam.topology.names import Topology, parse_topology


class CompilationError(RuntimeError):
    """The builder raised, or the compiler refused: what it said, such as by how much the memory does not suffice."""


class MissingExtraError(ImportError):
    """The Python that was asked to compile has no compiler for the topology."""


class Compilation(NamedTuple):
    """What a compiler made of a step. `shardadam.collectives` and `assert_collectives` read it as a compiled program.

    Attributes:
      topology: what it was compiled for.
      device_kind: what JAX calls the devices.
      num_devices: how many there are.
      memory: bytes on each device, and donated arguments that are not reused.
      text: the program's.
      seconds: how long the compiler took, once.
      versions: of jax, jaxlib and the compiler's library.
      key: of the cache: of all that the result depends on.
    """

    topology: Topology
    device_kind: str
    num_devices: int
    memory: Memory
    text: str
    seconds: float
    versions: dict[str, str]
    key: str

    def as_text(self) -> str:
        """The program's text."""
        return self.text

    @property
    def collectives(self) -> tuple[CollectiveOp, ...]:
        """What `shardadam.collectives` finds in it."""
        return collectives(self.text)


def compile_for(
    topology: str,
    build: str | Callable[..., Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    num_slices: int = 1,
    compiler_options: Mapping[str, str | bool | int | float] | None = None,
    python: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    timeout_seconds: float = 3600,
) -> Compilation:
    """Compiles a step for a topology, on a machine that has no accelerator. Nothing is run.

    The libraries of the compilers do not stand each other, nor a second topology, in one process: every case gets its
    own. A step and its abstract arguments hold a mesh of devices that exist only there, so what crosses over is the
    name of a function that builds them, `build(target, **kwargs) -> (step, *args)`: `step` is jitted, `args` are trees
    of `jax.ShapeDtypeStruct`s with shardings on `target.mesh(...)`. The process has the caller's import path.

    Args:
      topology: "v5p:4x8x8", "v5e:16x16", "v6e:16x16", "tpu7x:4x4x4", "h100:1x32x8" (slices x hosts x devices).
      build: "package.module:function", "path/to/file.py:function", or a function at the top level of a module.
      kwargs: for `build`; what JSON can hold.
      num_slices: of TPUs, how many slices of this topology are connected by a data center's network.
      compiler_options: as of `jax.stages.Lowered.compile`.
      python: the Python that has the compiler, `pip install 'shardadam[aot-tpu]'` or `[aot-gpu]`; the two want
        environments of their own. Default: the running one.
      cache_dir: where results are kept, by the program's own text (StableHLO, with its shardings and devices), the
        options and the versions: no change of any source can be missed, and what changes no program hits. Default:
        `$XDG_CACHE_HOME/shardadam/topologies`.
      timeout_seconds: after which the process is killed.

    Returns:
      A `Compilation`.

    Raises:
      ValueError: a topology, a builder or kwargs that cannot be passed on.
      MissingExtraError: that Python has no compiler for the topology.
      CompilationError: the builder raised, or the compiler refused, as where the memory does not suffice.

    Example:
      `docs/topologies.md` has a whole one::

        found = compile_for("v5e:2x2", "examples.step:build", kwargs={"layers": 2})
        found.memory.peak_bytes, [str(op) for op in found.collectives]
    """
    parsed = parse_topology(topology, num_slices)
    cache = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "shardadam" / "topologies")
    request = {
        "topology": topology,
        "num_slices": num_slices,
        "build": builder_name(build),
        "kwargs": dict(kwargs or {}),
        "compiler_options": dict(compiler_options or {}),
        "cache_dir": str(cache.expanduser()),
    }
    try:
        text = json.dumps(request)
    except TypeError as error:
        raise ValueError(f"kwargs: got {kwargs!r}, wanted what JSON can hold ({error})") from error
    answer = _run(parsed, text, python or sys.executable, timeout_seconds)
    if "missing" in answer:
        raise MissingExtraError(
            f"{topology}: {python or sys.executable} has no {answer['missing']}; install its compiler, in an "
            f"environment of its own: pip install 'shardadam[{parsed.extra}]' (docs/topologies.md)"
        )
    if "error" in answer:
        raise CompilationError(f"{parsed}: {answer['error']}")
    with gzip.open(answer["path"], "rt") as file:
        found = json.load(file)
    *sizes, not_donated = found.pop("memory")
    return Compilation(topology=parsed, memory=Memory._make([*sizes, tuple(not_donated)]), **found)


def builder_name(build: str | Callable[..., Any]) -> str:
    """The name by which another process finds a function: "module:function", or "/path/to/file.py:function".

    Raises:
      ValueError: it has none: a lambda, a method, a function within another.
    """
    if isinstance(build, str):
        place, _, function = build.rpartition(":")
        if not place or not function.isidentifier():
            raise ValueError(f"build: got {build!r}, wanted 'package.module:function' or 'path/to/file.py:function'")
        return f"{Path(place).resolve()}:{function}" if place.endswith(".py") else build
    module, name = getattr(build, "__module__", None), getattr(build, "__qualname__", "")
    if module is None or not name.isidentifier():
        raise ValueError(
            f"build: got {build!r}, wanted a function at the top level of a module, which another process can import; "
            "pass what it closes over as kwargs"
        )
    if module != "__main__" and importlib.util.find_spec(module) is not None:
        return f"{module}:{name}"
    return f"{Path(inspect.getfile(build)).resolve()}:{name}"


def _run(topology: Topology, request: str, python: str, timeout_seconds: float) -> dict[str, Any]:
    """What the process answers; the compilers write to stdout as they like, so the answer is a file."""
    settings = TPU_ENVIRONMENT if topology.platform == "tpu" else GPU_ENVIRONMENT
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS", "PYTHONPATH")}
    env |= settings | {"PYTHONPATH": os.pathsep.join(_import_path())}
    with tempfile.TemporaryDirectory(prefix="shardadam-topology-") as directory:
        answer, log = Path(directory, "answer.json"), Path(directory, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [python, "-m", "shardadam.topology.child", str(answer)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        try:
            process.communicate(request.encode(), timeout=timeout_seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompilationError(f"{topology}: not compiled after {timeout_seconds:g} s; killed") from error
            raise
        if answer.exists():
            return json.loads(answer.read_text())
        end = "\n  ".join(log.read_text(errors="replace").splitlines()[-12:])
    raise CompilationError(f"{topology}: the process ended with code {process.returncode} and no answer:\n  {end}")


def _import_path() -> list[str]:
    """The caller's import path without its own environment's packages: another Python has its own."""
    here = Path(__file__).parents[2]
    roots = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    paths = [Path(path or ".").resolve() for path in [str(here), *sys.path]]
    kept = [path for path in paths if not any(path.is_relative_to(root) for root in roots)]
    return list(dict.fromkeys(map(str, kept)))


def cache_key(*parts: Any) -> str:
    """A short name for all that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
