"""The presets: TOML files beside this one, each headed by what it is for."""

from __future__ import annotations

from pathlib import Path

from config.declaration import nearest
from config.errors import InvalidConfigurationError

FOLDER = Path(__file__).with_name("presets")


def preset_names() -> list[str]:
    """Every preset by name."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset; - and _ are the same in its name."""
    wanted = name.strip().lower().replace("-", "_")
    if wanted not in preset_names():
        raise InvalidConfigurationError(
            f'preset: there is no "{name.strip()}"{nearest(wanted, preset_names())} (there are: '
            f"{', '.join(preset_names())})"
        )
    return FOLDER / f"{wanted}.toml"


def preset_header(name: str) -> str:
    """The comment at the head of a preset: what it is, the hardware and time it needs, what to expect."""
    lines = preset_path(name).read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])
