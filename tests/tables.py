"""Writes the tables of docs/ that are computed, not measured: run by `scripts/tables`."""

import datetime
import os
import platform
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_TIME = "\n## Time\n"


def table_part(text: str) -> str:
    """A page without its section of measured times, which differ from machine to machine."""
    return text.split(_TIME)[0]


def main() -> None:
    import jax
    import meshes_table
    from shapes_table import page, timing

    where = (
        f" of CPU ({platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, jax "
        f"{jax.__version__}; {datetime.date.today()}).\n"
    )
    (DOCS / "shapes.md").write_text(page() + timing() + where)
    (DOCS / "meshes.md").write_text(meshes_table.page())


if __name__ == "__main__":
    main()
