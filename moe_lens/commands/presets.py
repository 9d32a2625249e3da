"""Presets: options of a command that belong together, each set in a small file of the package."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from moe_lens.errors import MoELensError
from moe_lens.progress import write

FOLDER = files("moe_lens") / "commands" / "preset_files"
PRESETS = ("paper", "released")


@dataclass(frozen=True)
class Section:
    """Marks the option that names a preset: which of its sections are for the command."""

    name: str


@dataclass(frozen=True)
class Preset:
    """A preset's file: what it is of, what of that cannot be done here, and by section the options' values."""

    name: str
    about: str
    not_reproduced: tuple[str, ...]
    sections: Mapping[str, Mapping[str, Any]]

    @classmethod
    def named(cls, name: str) -> "Preset":
        """MoELensError for a name that there is not."""
        if name not in PRESETS:
            raise MoELensError(f"--preset must be one of {', '.join(PRESETS)}; got {name!r}")
        read = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
        return cls(name, read.pop("about"), tuple(read.pop("not_reproduced")), read)

    def options(self, section: str, method: str | None = None) -> dict[str, Any]:
        """The values of a section, and of the table in it that has the name of the method."""
        own = self.sections[section]
        values = {name: value for name, value in own.items() if not isinstance(value, Mapping)}
        return values | dict(own.get(method or "", {}))


def with_preset(values: dict[str, Any], section: str, is_given: Callable[[str], bool]) -> dict[str, Any]:
    """The options' values, with those of the preset that they name where the user has given none; it is said which."""
    if values["preset"] is None:
        return values
    preset = Preset.named(values["preset"])
    wanted = preset.options(section, values.get("method"))
    own = {name: value for name, value in wanted.items() if not is_given(name)}
    told = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in own.items())
    kept = ", ".join(f"--{name.replace('_', '-')}" for name in wanted if name not in own)
    write(f"preset {preset.name}, {preset.about}: {told}{f'; given otherwise: {kept}' if kept else ''}")
    for lack in preset.not_reproduced:
        write(f"  not reproduced: {lack}")
    return values | own


def preset_facts(name: str | None, section: str) -> dict[str, Any]:
    """For provenance: the preset's file, as far as it is for the command; nothing without one."""
    if name is None:
        return {}
    preset = Preset.named(name)
    told = {"name": name, "options": dict(preset.sections[section]), "not_reproduced": list(preset.not_reproduced)}
    return {"preset": told}
