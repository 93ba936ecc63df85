"""README is short, and its programs, commands and links work."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fastcurv import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs the checkout")


def blocks(*languages):
    return [
        body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if language in languages
    ]


COMMANDS = [line for block in blocks("", "sh", "shell", "bash") for line in block.splitlines() if line.strip()]


def test_readme_is_read_in_a_few_minutes():
    assert README.count("\n") <= 150


def test_python_blocks_run_one_after_another():
    names = {}
    torch.manual_seed(0)
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert all(torch.isfinite(update).all() for update in names["updates"]) and not names["info"].any()


def makes(arguments):
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        assert re.search(rf"\$[({{]{name}\b" if is_variable else rf"^{name}:", makefile, re.M), argument


def installs(arguments):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", argument)
        assert found and set((found[1] or "").split(",")) - {""} <= set(extras), argument


def runs_module(arguments):
    dash, module, *options = arguments
    assert dash == "-m" and importlib.util.find_spec(module)
    usage = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True).stdout
    assert all(option in usage for option in options if option.startswith("-"))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line, monkeypatch):
    words = shlex.split(line, comments=True)
    building = (ROOT / "docs" / "building.md").read_text()
    while "=" in words[0]:
        assert f"`{words.pop(0).partition('=')[0]}`" in building
    for name in ("_info", "_bench", "_demo"):
        monkeypatch.setattr(cli, name, lambda options: 0)
    program, *arguments = words
    run = {"make": makes, "pip": installs, "python": runs_module, "fastcurv": cli.main}[program]
    assert not run(arguments)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda page: page.name,
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_readme_links_to_every_page_of_an_optimizer_and_to_the_tables():
    for name in (
        "adam",
        "sgd",
        "ranger",
        "lookahead",
        "layerwise",
        "orthogonalize",
        "kronecker",
        "benchmarks",
        "building",
    ):
        assert f"(docs/{name}.md)" in README
