"""The package keeps its order: which module may import which, what a module says of itself, one version."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import moe_lens

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_lens"
FILES = sorted(PACKAGE.rglob("*.py"))

#: A module imports from its own group and from those above it in this list, never from one below. A name
#: stands for the module or for everything in the folder of that name; the longest name that fits counts.
GROUPS = (
    ("", "errors", "extras", "interruption", "progress"),
    ("experts", "routing", "data", "results", "rows_on_disk", "storage"),
    ("architecture", "metrics"),
    ("lens",),
    ("statistics", "checks", "report", "traces"),
    ("decoding",),
    ("causal",),
    ("choosing",),
    ("tuning",),
    ("commands",),
    ("organism", "paper"),
    (
        "atlas",
        "compare",
        "demo",
        "evaluate",
        "find",
        "intervene",
        "measure",
        "tune",
        "doctor",
        "report.__main__",
        "organism.pretrain",
        "organism.measure",
        "__main__",
    ),
)
#: Command lines that are functions for others too: the organism's questions.
IMPORTED_COMMANDS = {"organism.questions"}

FAMILIES = re.compile(
    r"mixtral|mistral|olmoe|deepseek|minicpm|qwen|gpt[-_ ]?oss|dbrx|jamba|phi-?moe|llama|granite|gemma|glm",
    re.IGNORECASE,
)


def module_name(path: Path) -> str:
    """Dotted name below the package; "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


NAMES = {module_name(path): path for path in FILES}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(NAMES[name].read_text(encoding="utf-8"))


def is_ours(full: str) -> bool:
    return full.split(".")[0] == "moe_lens"


@cache
def face(package: str) -> dict[str, str]:
    """The names that a package hands on, each with the module of ours that it is from."""
    stub = PACKAGE.joinpath(*filter(None, package.split("."))) / "__init__.pyi"
    if not stub.is_file():
        return {}
    nodes = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{package}.{node.module}".lstrip(".") for node in nodes for alias in node.names}


@cache
def imports(name: str) -> frozenset[str]:
    """Full names of the modules that a module imports, for types only too; `from a import b` is a.b if that is ours."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write moe_lens.…"
            handed_on = face(node.module.removeprefix("moe_lens").lstrip(".")) if is_ours(node.module) else {}
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if alias.name in handed_on:
                    full = f"moe_lens.{handed_on[alias.name]}"
                found.add(full if full.removeprefix("moe_lens.") in NAMES else node.module)
    return frozenset(found)


@cache
def siblings(name: str) -> frozenset[str]:
    """The modules of the package that a module imports, named below the package."""
    own = {full.removeprefix("moe_lens").lstrip(".") for full in imports(name) if full.split(".")[0] == "moe_lens"}
    assert own <= set(NAMES), f"{name} imports {own - set(NAMES)}"
    return frozenset(own)


def group(name: str) -> int:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for place, names in enumerate(GROUPS):
            if ".".join(parts[:length]) in names:
                return place
    pytest.fail(f"moe_lens.{name} has no place in the order of imports; give it one in GROUPS")


def commands() -> set[str]:
    """The modules with an `if __name__ == "__main__"` part."""
    return {
        name
        for name in NAMES
        for node in tree(name).body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    }


def find_circle(graph: dict[str, frozenset[str]]) -> list[str] | None:
    """Some chain of imports that leads back to its start, or None."""
    done: set[str] = set()

    def visit(name: str, chain: list[str]) -> list[str] | None:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph[name]):
            if circle := visit(target, [*chain, name]):
                return circle
        done.add(name)
        return None

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), None)


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_imports_go_one_way(name):
    wrong = {target for target in siblings(name) if group(target) > group(name)}
    assert not wrong, f"moe_lens.{name} must not import {', '.join(sorted(wrong))}, which builds on it"


def test_no_imports_go_in_a_circle():
    assert find_circle({name: siblings(name) for name in NAMES}) is None


def test_find_circle_finds_one():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert find_circle({name: frozenset(targets) for name, targets in graph.items()}) == ["b", "c", "b"]


def test_only_the_lens_imports_nnsight():
    users = {name for name in NAMES if any(full.split(".")[0] == "nnsight" for full in imports(name))}
    assert users == {"lens.opened"}


def test_command_lines_are_imported_by_nobody():
    imported = {target: name for name in NAMES for target in siblings(name)}
    wrong = {target: imported[target] for target in commands() - IMPORTED_COMMANDS if target in imported}
    assert not wrong


def test_no_two_modules_share_a_name():
    """Nor do two differ by an ending only; a command line and its room may."""
    stems: dict[str, str] = {}
    for name in NAMES:
        stem = name.rpartition(".")[2]
        if not name or stem in ("__main__",) or name in commands() or (PACKAGE / name.replace(".", "/")).is_dir():
            continue
        assert stem not in stems, f"moe_lens.{name} and moe_lens.{stems[stem]} have one name"
        stems[stem] = name
    words = {re.sub(r"(s|ing|ed|ings)$", "", stem): stem for stem in stems}
    assert len(words) == len(stems), sorted(set(stems) - set(words.values()))


def test_every_public_name_is_there_when_all_modules_are_imported():
    """A module must not hide a name that its package hands on; the commands are modules too."""
    found = [name for _, name, _ in pkgutil.walk_packages(moe_lens.__path__, "moe_lens.") if "__main__" not in name]
    modules = [moe_lens, *map(importlib.import_module, found)]
    for package in modules:
        for name in getattr(package, "__all__", ()):
            assert not inspect.ismodule(getattr(package, name)), f"{package.__name__}.{name} is a module"
            assert f"{package.__name__}.{name}" not in found, "what it is depends on what was imported first"
    assert sum(hasattr(module, "__all__") for module in modules) > 10


@pytest.mark.slow
@pytest.mark.long
def test_the_package_is_typed_for_its_users(tmp_path):
    """What is not there is an error for a type checker, also behind the names that are imported when asked for."""
    (tmp_path / "user.py").write_text(
        "from moe_lens import MoELens, Nonsense\nMoELens.from_pretrained('organism').no_such_method(1)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", f"--cache-dir={tmp_path}", "user.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'has no attribute "Nonsense"' in run.stdout, run.stdout
    assert '"MoELens" has no attribute "no_such_method"' in run.stdout
    assert "Found 2 errors" in run.stdout


def test_public_names_are_few_and_each_says_what_it_is_for():
    assert len(moe_lens.__all__) <= 40
    for name in moe_lens.__all__:
        value = getattr(moe_lens, name)
        if callable(value):
            assert value.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", list(NAMES), ids=lambda name: name or "moe_lens")
def test_every_module_says_its_purpose_in_one_sentence(name):
    text = ast.get_docstring(tree(name))
    assert text, "no docstring"
    first = text.split("\n\n")[0].replace("\n", " ")
    assert re.search(r"[.?]$|`$", first), f"not a sentence: {first!r}"
    assert len(re.findall(r"[.?!] (?=[A-Z])", first)) == 0, f"more than one sentence: {first!r}"


@pytest.mark.parametrize("name", [name for name in NAMES if name.split(".")[0] not in {"architecture", "organism"}])
def test_no_model_familys_name_outside_architecture(name):
    lines = NAMES[name].read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if FAMILIES.search(line)] == []


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert moe_lens.__version__ == project["version"] == citation[1] == changes[1]


def test_every_dependency_has_an_exact_version_within_its_range():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    installed = [text for name in ("dev", "docs", "image", "judge", "text") for text in extras[name]]
    for text in [*project["dependencies"], *installed]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[requirement.name]), f"{text} against {pinned[requirement.name]}"
