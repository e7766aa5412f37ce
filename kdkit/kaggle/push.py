"""The real `kaggle` client, and the server's answer read in full.

The client exits 0 when the server refuses a kernel, drops a source or saves no version, and says nothing of a dropped
model. Here each of these is a failure.
"""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdkit.errors import RunFailed, UserError

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import ApiSaveKernelResponse, KaggleApi

DROPPED = {
    "invalid_dataset_sources": "datasets",
    "invalid_kernel_sources": "kernels",
    "invalid_model_sources": "models",
    "invalid_competition_sources": "competitions",
    "invalid_tags": "tags",
}
"""Fields of the answer that list what the server left out, and what they list."""


@dataclass(frozen=True)
class PushedKernel:
    """A version that Kaggle has saved and now runs."""

    version: int
    url: str


def push_kernel(folder: Path) -> PushedKernel:
    """Push the kernel of one folder; Kaggle runs it at once.

    Args:
        folder: holds a `kernel-metadata.json`.
    Returns:
        What the server saved.
    Raises:
        UserError: the client is missing, not logged in, or refuses the folder.
        RunFailed: the server could not be reached, refused the kernel, or saved less than was sent.
    """
    with redirect_stdout(sys.stderr):  # the client prints advice; stdout is for results
        client = _logged_in_client()
        try:
            answer = client.kernels_push(str(folder))
        except ValueError as error:
            raise UserError(f"the kaggle client refuses {folder}: {error}") from error
        except OSError as error:  # what requests raises for a refused connection and for an HTTP status
            raise RunFailed(f"nothing is pushed from {folder}: {error}") from error
    faults = list(faults_of(answer))
    if faults:
        account = client.get_config_value("username")
        raise RunFailed(f"{folder}: " + "; ".join(faults) + f" (logged in as {account})")
    return PushedKernel(version=answer.version_number, url=answer.url)


def faults_of(answer: "ApiSaveKernelResponse") -> Iterator[str]:
    """What the server refused or left out."""
    if answer.error:
        yield f"Kaggle refused the kernel: {answer.error}"
        return
    if not answer.version_number:
        yield "Kaggle answered without a version, so that nothing may be saved"
    for field, kind in DROPPED.items():
        names = getattr(answer, field)
        if names:
            yield f"Kaggle left out the {kind} {', '.join(names)}: they must exist and be open to this account"


def _logged_in_client() -> "KaggleApi":
    """The client with the account of this machine."""
    try:
        from kaggle.api.kaggle_api_extended import KaggleApi
    except ModuleNotFoundError as error:  # in a checkout `import kaggle` alone finds the folder of that name
        raise UserError("the Kaggle client is not installed: pip install 'kdkit[kaggle]'") from error
    client = KaggleApi()
    try:
        client.authenticate()
    except SystemExit as error:
        raise UserError("the Kaggle client is not logged in: run kaggle auth login") from error
    return client
