"""Brings an exported folder to a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.options import ConfigError
from pipeline.exported.folder import CARD, MANIFEST, read_manifest

TOKEN = "log in by `hf auth login`, or set HF_TOKEN"


def refuse_unreachable(repository: str) -> None:
    """Raise ConfigError where nothing could be uploaded, in one line, before minutes are spent on an export."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("--push: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"--push {repository}: no token of the hub; {TOKEN}")
    _asked(lambda: huggingface_hub.HfApi().whoami(), repository)


def push(folder: Path, repository: str) -> str:
    """Upload the files that the manifest lists, with card and manifest; a repository that is not there becomes a
    private one. Its address.

    Raises:
        ConfigError: the hub refuses, or is not reachable.
    """
    import huggingface_hub

    api, names = huggingface_hub.HfApi(), [*read_manifest(folder)["files"], MANIFEST, CARD]
    _asked(lambda: api.create_repo(repository, private=True, exist_ok=True), repository)
    message = f"Export of {folder.name} by OpenFLM"
    return str(
        _asked(
            lambda: api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=names, commit_message=message
            ),
            repository,
        )
    )


def _asked(ask, repository: str):
    try:
        return ask()
    except Exception as error:  # many libraries speak below; all mean that the hub does not do what it is asked
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"--push {repository}: the hub refuses or is not reachable ({reason}); {TOKEN}") from error
