"""Where a checkpoint lies: a bundled one, a folder or a Hub repository -> its folder."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from nanoflow.core.config.errors import CheckpointError, did_you_mean, one_line
from nanoflow.core.loading.foreign_formats import why_no_folder, why_no_weights
from nanoflow.core.loading.weight_files import names_of_weights, shards

ASSETS = Path(__file__).parents[2] / "assets"

# What is read beside the weights: configs, tokenizers and chat templates. Other folders of a repository hold exports.
FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
OF_EXPORTS = ["*/*.json", "*/*.txt", "*/*.model"]


def resolve(name: str, *, weights: bool = False, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a bundled one, a folder, or a Hub repository (downloaded, or from its cache).

    Some bundled ones, such as `qwen3-8b`, are a config.json alone, for random weights.

    Args:
        name: of the checkpoint.
        weights: whether to download them too: those files of a repository that `weight_files` reads, and no others.
        revision: branch, tag or commit of a repository; None for main.

    Raises:
        CheckpointError: no such folder, and no such repository that can be reached; or a revision of a folder.
    """
    if name in (folders := bundled()):
        return _of_no_revision(folders[name], revision)
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return _of_no_revision(folder, revision)
        is_file = folder.exists()
    except (OSError, RuntimeError):  # a name that is too long, or ~ of an unknown user
        is_file = False
    if is_file:
        raise CheckpointError(why_no_folder(folder))
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    hint = did_you_mean(name[:80], folders)
    try:
        return _download(name, weights, revision)
    except CheckpointError:
        raise
    except HFValidationError:
        raise CheckpointError(
            f"Checkpoint {name!r:.200} does not exist: there is no such folder, and it is no Hub id.{hint}"
        ) from None
    except GatedRepoError as error:
        raise CheckpointError(
            f"Checkpoint {name!r:.200} is gated; accept its terms on its page of the Hub, and log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except Exception as error:  # the Hub's client lets many kinds through, its transport's among them
        raise CheckpointError(
            f"Checkpoint {name!r:.200} is not a folder here and could not be had from the Hub "
            f"({type(error).__name__}); check the name, {f'its revision {revision!r:.80}, ' if revision else ''}"
            f"the network, or HF_HUB_OFFLINE.{hint}"
        ) from error


def _of_no_revision(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise CheckpointError(
            f"{folder} is a folder, which has no revision {revision!r:.80}; leave revision out, or name a Hub id."
        )
    return folder


def bundled() -> dict[str, Path]:
    """The checkpoints that come with the package: their folders by name."""
    return {file.parent.name: file.parent for file in ASSETS.rglob("config.json")}


def _download(repository: str, weights: bool, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=FILES, ignore_patterns=OF_EXPORTS))
    if not weights:
        return folder
    commit = folder.name  # all files are of one, even if the repository changes meanwhile

    def fetch(names: list[str]) -> None:
        snapshot_download(repository, revision=commit, allow_patterns=[escape(name) for name in names])

    names = names_of_weights(folder)
    for name in names:
        fetch([name])
        if (folder / name).exists():
            if name.endswith(".json"):
                fetch(shards(folder / name))
            return folder
    raise CheckpointError(why_no_weights(repository, _list_files(repository, commit)))


def _list_files(repository: str, commit: str) -> list[str]:
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(repository, revision=commit)
    except Exception as error:
        raise CheckpointError(
            f"{repository} has no model.safetensors in the cache, and its files can't be listed ({one_line(error)}); "
            "check the network, or HF_HUB_OFFLINE."
        ) from error
