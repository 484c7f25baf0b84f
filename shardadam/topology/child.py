"""The process that compiles one case: reads a request on stdin, writes an answer to the file it is told."""

import gzip
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from shardadam.topology.names import Topology, parse_topology

_COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
}


def main() -> None:
    """Never raises: the parent reads what went wrong in the answer."""
    request, answer = json.load(sys.stdin), Path(sys.argv[1])
    try:
        found = compile_case(request)
    except Exception as error:  # noqa: BLE001  What a builder or a compiler raises can be anything.
        found = {"error": "".join(traceback.format_exception_only(error)).strip(), "trace": traceback.format_exc()}
    answer.write_text(json.dumps(found))


def compile_case(request: dict[str, Any]) -> dict[str, str]:
    """Where the result is, or what is missing."""
    topology = parse_topology(request["topology"], request["num_slices"])
    try:
        versions = _versions(topology)
    except importlib.metadata.PackageNotFoundError as error:
        return {"missing": str(error.name)}
    from shardadam.hlo import memory
    from shardadam.topology.compiling import cache_key
    from shardadam.topology.target import load_target

    target = load_target(topology)
    step, args, mesh = check_built(_load(request["build"])(target, **request["kwargs"]))
    lowered = step.lower(*args)
    order = [device.id for device in mesh.devices.flat]
    key = cache_key(lowered.as_text(), order, str(topology), request["compiler_options"], versions)
    path = Path(request["cache_dir"], f"{key}.json.gz")
    if not path.exists():
        begin = time.perf_counter()
        compiled = lowered.compile(compiler_options=request["compiler_options"] or None)
        result = {
            "device_kind": target.device_kind,
            "num_devices": len(target.devices),
            "seconds": time.perf_counter() - begin,
            "memory": memory(compiled),
            "text": compiled.as_text(),
            "versions": versions,
            "key": key,
        }
        _write(path, result)
    return {"path": str(path)}


def check_built(built: Any) -> tuple[Any, list[Any], Any]:
    """What a builder returned, as (step, arguments, the mesh of the first that is on one).

    Raises:
      ValueError: it is no jitted step with arguments, or none of these says its devices.
    """
    import jax

    step, *args = built if isinstance(built, tuple | list) and built else (built,)
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
    meshes = [sharding.mesh for sharding in shardings if hasattr(sharding, "mesh")]
    if not hasattr(step, "lower") or not meshes:
        got = f"{type(step).__name__} and {len(args)} arguments, {len(meshes)} of their leaves on a mesh"
        raise ValueError(
            f"build: it returned {got}; wanted (step, *args): what jax.jit makes, and trees of jax.ShapeDtypeStruct "
            "with shardings on target.mesh(...)"
        )
    return step, args, meshes[0]


def _load(name: str) -> Any:
    """The builder, from a module or from a file."""
    place, _, function = name.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), function)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None, name
    assert spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, function)


def _versions(topology: Topology) -> dict[str, str]:
    names = ("jax", "jaxlib", *_COMPILERS[topology.platform])
    return {name: importlib.metadata.version(name) for name in names}


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: two processes may compile the same case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with gzip.open(part, "wt") as file:
        json.dump(result, file)
    part.replace(path)


if __name__ == "__main__":
    main()
