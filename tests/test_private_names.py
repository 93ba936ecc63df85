"""Private names of torch in the sources are the listed ones, and the torch at hand has them."""

import ast
import pkgutil
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from private_names import PRIVATE_NAMES

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("fastcurv/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("bench/**/*.py")]
# Packages of torch whose code reads attributes that others set, named by string constants.
READERS = ("amp", "distributed.fsdp")
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def names_of_torch():
    """Private attributes of torch's classes, and those that its packages look up by name: {attribute: full name}."""
    found = {}
    for package in READERS:
        for path in (Path(torch.__file__).parent / package.replace(".", "/")).rglob("*.py"):
            found |= {name: f"{package}.{name}" for name in re.findall(r'"(_[a-z]\w+)"', path.read_text())}
    parameter = torch.nn.Parameter(torch.zeros(1))
    found |= {name: f"Tensor.{name}" for name in dir(parameter)}
    found |= {name: f"Optimizer.{name}" for name in dir(torch.optim.SGD([parameter]))}
    found.pop("_fields", None)  # Python's, of named tuples
    return {name: full for name, full in found.items() if PRIVATE.fullmatch(name)}


def dotted_names(tree):
    """The private names of torch in a file, imported or written as a path that starts at `torch`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def attributes(tree):
    """Attributes that a file reads, writes, names in a string, or defines in a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                yield getattr(member, "name", "")
                targets = getattr(member, "targets", [getattr(member, "target", None)])
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def private_names(sources):
    of_torch, found = names_of_torch(), defaultdict(set)
    for path, text in sources.items():
        tree = ast.parse(text)
        dotted = {name for name in dotted_names(tree) if re.match(r"torch\.(\w+\.)*_[a-zA-Z]", name)}
        # torch._C is a part of torch._C._name.
        dotted = {name for name in dotted if not any(other.startswith(f"{name}.") for other in dotted)}
        for name in dotted | {of_torch[name] for name in attributes(tree) if name in of_torch}:
            found[name].add(path)
    return found


def test_the_list_is_complete():
    names = {path: path.relative_to(ROOT).as_posix() for path in SOURCES}
    mapped = re.compile("fastcurv/(kernels|bench)/")  # links, where a checkout has them
    found = private_names({name: path.read_text() for path, name in names.items() if not mapped.match(name)})
    assert found == {name: files for name, (files, _) in PRIVATE_NAMES.items()}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.optim.optimizer import _use_grad_for_differentiable", "torch.optim.optimizer._use_grad_for_differentiable"),
        ("torch._foreach_add_(a, b)", "torch._foreach_add_"),
        ("optimizer._zero_grad_profile_name", "Optimizer._zero_grad_profile_name"),
        ("class A:\n    def _patch_step_function(self): ...", "Optimizer._patch_step_function"),
        ("class A:\n    _step_supports_amp_scaling: bool = True", "amp._step_supports_amp_scaling"),
        ("getattr(p, '_fsdp_flattened', False)", "distributed.fsdp._fsdp_flattened"),
    ],
)  # fmt: skip
def test_a_use_is_found(line, name):
    assert private_names({"a.py": line}) == {name: {"a.py"}}


@pytest.mark.parametrize("name", [name for name in PRIVATE_NAMES if name.startswith("torch.")])
def test_torch_has_it(name):
    assert callable(pkgutil.resolve_name(name))
