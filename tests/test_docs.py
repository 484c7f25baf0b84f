"""Every Python block of the README and docs runs, and so does every example in a docstring of the core."""

import dataclasses
import doctest
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import shardadam
from shardadam.trainer.build import plan_for
from shardadam.trainer.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ["layout", "plan", "optimizer", "sharded", "train_state", "handles", "params", "precision"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        for example in Sybil([PythonCodeBlockParser()], path=str(ROOT)).parse(page).examples():
            example.evaluate()


def test_the_readme_has_blocks_to_run():
    assert (ROOT / "README.md").read_text().count("```python") >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"shardadam.{name}")
    names = {"jax": jax, "jnp": jnp, "shardadam": shardadam, "make_plan": shardadam.make_plan}
    with jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(module, extraglobs=names)
    assert result.attempted
    assert not result.failed


def test_the_bytes_in_the_readme_are_those_of_the_plan():
    rows = re.findall(
        r"^\| ([\w-]+) \(\w+\) \| ([\d,]+) \| (\S+) \| ([\d,]+) \| ([\d,]+) \|", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == 5
    for name, *numbers in rows:
        config = dataclasses.replace(load_config(ROOT / "configs" / f"{name}.yaml"), mesh=numbers.pop(1))
        plan = plan_for(config)
        size = sum(leaf.size for leaf in plan.leaves.values())
        wanted = [size, plan.replicated_state_bytes(), plan.state_bytes_per_device()]
        assert [int(number.replace(",", "")) for number in numbers] == wanted
