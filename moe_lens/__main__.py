"""The commands of the package, listed: `python -m moe_lens`."""

import ast
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from moe_lens import __doc__ as about
from moe_lens import __version__

PACKAGE = Path(__file__).parent


def main(words: Sequence[str]) -> int:
    """Lists the commands, or tells the version or what is wrong with the words; the exit code."""
    if list(words) == ["--version"]:
        print(f"moe_lens {__version__}")
        return 0
    known = commands()
    if list(words) in ([], ["--help"]):
        width = max(map(len, known))
        print(f"{about}\n\nThe commands are")
        for name, sentence in known.items():
            print(f"  python -m moe_lens.{name:{width}}  {sentence}")
        print("\nEach says with --help what it takes: python -m moe_lens.tune --help")
        return 0
    near = get_close_matches(words[0], known, n=1)
    hint = f"python -m moe_lens.{near[0]} --help says what that takes" if near else "python -m moe_lens lists them"
    print(f"error: a command is given as python -m moe_lens.NAME; got {' '.join(words)!r}; {hint}", file=sys.stderr)
    return 2


def commands() -> dict[str, str]:
    """The commands by name, each with the first sentence of its help; read from their files, without importing any."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        runs = path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
        if runs and path != Path(__file__) and (told := _help(path)) is not None:
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__main__")
            found[name] = told.partition("\n\n")[0].replace("\n", " ").partition(". ")[0].removesuffix(".")
    return dict(sorted(found.items(), key=lambda item: (item[0].count("."), item[0])))


def _help(path: Path) -> str | None:
    """What the function `main` says of itself there, or where it is imported from; None without one."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == "main" for alias in node.names):
            return _help(PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py"))
    return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
