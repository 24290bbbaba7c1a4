"""Data sets of the Hugging Face Hub as local Parquet files. Knows nothing of what is in them.

The Hub keeps every public set as Parquet too, under the revision ``refs/convert/parquet``, as
``<configuration>/<split>/<number>.parquet``: no script of a set is run, and no further library is needed.
"""

from pathlib import Path, PurePosixPath

from training.errors import TrainingError

REVISION = "refs/convert/parquet"


def hub_files(name: str, split: str) -> list[Path]:
    """Download the files of a split, those left out that the Hub's cache on this machine holds.

    ``name`` is ``owner/set`` or, where a set has several configurations, ``owner/set/configuration``. Raises
    ``TrainingError`` saying which configurations and splits there are.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, configuration = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        api = HfApi()
        listed = api.list_repo_files(repository, repo_type="dataset", revision=REVISION)
        files = _chosen(name, configuration, split, listed)
        return [Path(api.hf_hub_download(repository, file, repo_type="dataset", revision=REVISION)) for file in files]
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise TrainingError(
            f"hub:{name}: cannot be had from the Hub: {str(error).strip().splitlines()[0]} (a private set needs "
            "HF_TOKEN; without a network, put the set's Parquet files into the data folder and name that)"
        ) from error


def _chosen(name: str, configuration: str, split: str, listed: list[str]) -> list[str]:
    """The files of one split of one configuration."""
    paths = [path for path in map(PurePosixPath, sorted(listed)) if path.suffix == ".parquet" and len(path.parts) == 3]
    configurations = sorted({path.parts[0] for path in paths})
    if not configuration and len(configurations) == 1:
        configuration = configurations[0]
    if configuration not in configurations:
        raise TrainingError(
            f"hub:{name}: name one of its configurations, {', '.join(configurations) or 'none'}: "
            f"hub:{'/'.join(name.split('/')[:2])}/CONFIGURATION"
        )
    own = [path for path in paths if path.parts[0] == configuration]
    files = [str(path) for path in own if path.parts[1] == split]
    if not files:
        splits = sorted({path.parts[1] for path in own})
        raise TrainingError(f"hub:{name}: no split {split!r}; it has {', '.join(splits)}")
    return files
