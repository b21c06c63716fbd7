"""What a folder from elsewhere may do: be read. Whatever would run code of it, or leads out of it, is refused first.

Looked at are small files, before any weight is loaded and before transformers or mlx-lm see the folder.

    code         model_file in config.json, auto_map for a tokenizer: run only with trust_remote_code = true
    pickles      opening one runs what is in it, so none is opened, with consent or without; but for tokenizer.pkl, by
                 an unpickler that knows tiktoken's encoding and nothing else (``pickled_tokenizer``)
    ways out     an index that names ../ or /, links to somewhere else (docs/security.md says which may stay)

``auto_map`` for a *model* is let through: mlx-lm has architectures of its own, and transformers is told not to run it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from config.errors import CheckpointError, ModelLoadError, ToolkitError

Refusal = Callable[[str], ToolkitError]

#: What holds nothing but numbers: a link to it can be followed without harm.
ONLY_NUMBERS = ".safetensors"
PICKLES = (".pkl", ".pickle")
ENCODING = "tokenizer.pkl"


def check_model_folder(folder: Path, *, trust_remote_code: bool, field: str = "model_name") -> list[str]:
    """Refuse a model folder that wants code of its own run, or that leads out of itself.

    Args:
        trust_remote_code: the user has agreed to run what comes with the model.
    Returns:
        What will be run, a sentence for each; empty without that consent.
    Raises:
        ModelLoadError: naming the file and what it asks for.
    """

    def refusal(reason: str) -> ToolkitError:
        return ModelLoadError(f"{field}: {reason}")

    _check_links(folder, refusal, follow=ONLY_NUMBERS)
    for file in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = _object(file).get("weight_map")
        names = map(str, weight_map.values() if isinstance(weight_map, dict) else ())
        for name in dict.fromkeys(names):
            _check_inside(name, file, refusal)
    agreed = []
    for file, asked, wanted in _code_asked_for(folder):
        source = wanted.split("--")[0] if "--" in wanted else ""
        if not source:
            _check_inside(
                f"{wanted.split('.')[0]}.py" if not wanted.endswith(".py") else wanted, file, refusal
            )
        if not trust_remote_code:
            raise refusal(
                f"{file} asks for Python code to be run ({asked}: {wanted}"
                + (f", from the repository {source}" if source else "")
                + "), which can do whatever you can; read it, and if you trust it set trust_remote_code = true, or "
                "choose a model that mlx-lm knows"
            )
        agreed.append(f"{field}: running {wanted}, as {file} asks for ({asked}; trust_remote_code is true)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        for file in sorted(folder.glob("tokenizer*")):
            if file.suffix in PICKLES and file.name != ENCODING:
                raise refusal(
                    f"{file} is a pickle, which may run any code when it is opened, so it is not; write the tokenizer "
                    "as tokenizer.json where it comes from (tokenizers' Tokenizer.save)"
                )
    return agreed


def check_adapter_folder(folder: Path) -> None:
    """Refuse an adapter or checkpoint folder with a link that leads out of it.

    Raises:
        CheckpointError: naming the link and where it leads.
    """
    _check_links(folder, CheckpointError)


def _code_asked_for(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """The file, the key and the code, for each that a loader would run."""
    config = _object(folder / "config.json")
    if config.get("model_file") is not None:
        yield folder / "config.json", "model_file", str(config["model_file"])
    tokenizer = folder / "tokenizer_config.json"
    for file, content in ((folder / "config.json", config), (tokenizer, _object(tokenizer))):
        found = content.get("auto_map")
        if isinstance(found, dict):
            found = found.get("AutoTokenizer")
        elif file != tokenizer:
            continue  # of a model
        for wanted in found if isinstance(found, list) else [found]:
            if wanted is not None:
                yield file, "auto_map", str(wanted)


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, which whoever needs it says better."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_inside(name: str, file: Path, refusal: Refusal) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (len(name) > 1 and name[1] == ":"):
        raise refusal(
            f'{file} names "{name}", which is outside its folder; a model has its files beside one another'
        )


def _check_links(folder: Path, refusal: Refusal, follow: str | None = None) -> None:
    """Links may lead to a place inside the folder, or to the blobs of the Hugging Face cache that it stands in.

    ``follow``: files of this ending may be links to anywhere.
    """
    home = folder.resolve()
    allowed = [home, *_blobs_of(home)]
    for path in sorted(folder.glob("*")):
        if not path.is_symlink() or (follow is not None and path.suffix == follow):
            continue
        target = Path(os.path.realpath(path))  # resolve() may raise where links lead in a circle
        if not any(target.is_relative_to(place) for place in allowed):
            raise refusal(f"{path} is a link out of its folder, to {target}; put a copy in its place")


def _blobs_of(folder: Path) -> list[Path]:
    """``models--NAME/blobs`` for ``models--NAME/snapshots/REVISION``, where the hub client keeps the files."""
    above = folder.parents
    if len(above) > 1 and above[0].name == "snapshots" and above[1].name.startswith("models--"):
        return [above[1] / "blobs"]
    return []
