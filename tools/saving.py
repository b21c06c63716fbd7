"""A whole model into a folder of its own: complete, or not there."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import CheckpointError, InvalidConfigurationError
from models.sft_model import LanguageModel, save_language_model
from tools.loading import source_folder

GENERATION = "generation_config.json"


def check_new(path: str | Path, option: str) -> Path:
    """Refuse a folder that holds something: mlx-lm merges the weights of every file it finds in one.

    Raises:
        CheckpointError: naming ``option``.
    """
    folder = Path(path).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(
            f'{option}: "{folder}" is there already, and weights of two models must not mix; name another folder or '
            "remove it"
        )
    return folder


@contextmanager
def fresh_folder(path: str | Path, option: str) -> Iterator[Path]:
    """A folder beside ``path`` that takes its name when the block has ended well; else nothing is left of it."""
    target = check_new(path, option)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(
            f'{option}: "{target}" cannot be written to ({error.strerror or error}); choose another folder'
        ) from error
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's is for its owner alone
        if target.is_dir():
            target.rmdir()  # it is empty
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def save_whole(language_model: LanguageModel, folder: Path, *, own_code: bool = False) -> None:
    """Write a model with what its source has beside the weights.

    Args:
        own_code: copy the source's Python files, which a model that was loaded with them needs again.
    """
    save_language_model(language_model, folder)
    source = source_folder(language_model.name)
    if source is None:
        return
    for pattern in (GENERATION, "*.py") if own_code else (GENERATION,):
        for file in source.glob(pattern):
            shutil.copy(file, folder / file.name)


def set_end_token(language_model: LanguageModel, token: str) -> None:
    """Make ``token`` what ends an answer, in the tokenizer and in the config.

    Raises:
        InvalidConfigurationError: the tokenizer has no such token.
    """
    tokenizer = language_model.tokenizer
    number = tokenizer.get_vocab().get(token)
    if number is None:
        special = ", ".join(tokenizer.all_special_tokens)
        raise InvalidConfigurationError(
            f'--eos-token: the tokenizer has no token "{token}" (special ones: {special})'
        )
    tokenizer._tokenizer.eos_token = token
    language_model.config["eos_token_id"] = number


def rewrite_end_token(folder: Path, number: int) -> None:
    """The same in a copied generation_config.json, which mlx-lm believes before config.json."""
    path = folder / GENERATION
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        content["eos_token_id"] = number
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# The Hugging Face Hub ------------------------------------------------------------------------------------


def upload(folder: Path, repo: str, base: str | None, *, consented: bool) -> bool:
    """Put a saved model on the hub, in a public repository, if the user agrees; whether that was done.

    Args:
        base: the Hugging Face name of what it was made from, for the model card.
        consented: ``--yes`` was given; otherwise the terminal is asked.
    """
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e9
    print(
        f"to be uploaded: {len(files)} files of {folder}, {size:.2f} GB, to huggingface.co/{repo}, for everybody to see"
    )
    if not consented:
        answer = input("type yes to upload: ") if sys.stdin.isatty() else ""
        if answer.strip().lower() != "yes":
            print(f"not uploaded; the model is in {folder} (--yes uploads without asking)")
            return False
    from huggingface_hub import HfApi, ModelCard, ModelCardData

    # mlx-lm's upload_to_hub calls what newer hub clients have no more, after making the repository.
    about = ModelCardData(library_name="mlx", pipeline_tag="text-generation", tags=["mlx"], base_model=base)
    made_from = f" of [{base}](https://huggingface.co/{base})" if base is not None else ""
    card = f"---\n{about.to_yaml()}\n---\n\n# {repo}\n\nAn MLX model{made_from}.\n\n    mlx_lm.chat --model {repo}\n"
    try:
        ModelCard(card).save(folder / "README.md")
        hub = HfApi()
        hub.create_repo(repo, private=False, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload an MLX model")
        print(f"uploaded to {hub.endpoint}/{repo}")
    except Exception as error:  # the hub client's and the network's many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"--upload-repo: {repo} could not be uploaded ({type(error).__name__}: {reason}); the model is in "
            f"{folder}, hf upload {repo} {folder} tries again"
        ) from error
    return True
