"""From the table to what the `kaggle` client reads: `kernel-metadata.json` per notebook, `dataset-metadata.json`."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from kdkit.errors import UserError
from kdkit.kaggle.table import TABLE_FILE, Kernel, Table

KERNEL_FILE = "kernel-metadata.json"
DATASET_FILE = "dataset-metadata.json"
DATASET_FOLDER = Path("kaggle", "dataset")
LARGEST_NOTEBOOK_BYTES = 2**20
"""Notebooks without outputs are some ten kB; a larger one carries what belongs into a dataset."""

Metadata = dict[str, object]


def kernel_folder(root: Path, table: Table, kernel: Kernel) -> Path:
    """Where a kernel is pushed from: `kaggle/` for the first of the table, `kaggle/<slug>/` for each other."""
    main = root / TABLE_FILE.parent
    return main if kernel == table.kernels[0] else main / kernel.slug


def kernel_metadata(root: Path, table: Table, kernel: Kernel, *, owner: str, resumed: bool) -> Metadata:
    """What the client sends for one kernel.

    Args:
        root: the checkout.
        table: of that checkout.
        kernel: one of the table.
        owner: Kaggle account.
        resumed: attach the output of its own latest version, so that its run goes on.
    Returns:
        The content of its `kernel-metadata.json`.
    """
    folder = kernel_folder(root, table, kernel)
    return {
        "id": f"{owner}/{kernel.slug}",
        "title": kernel.title,
        "code_file": Path(os.path.relpath(root / "notebooks" / kernel.notebook, folder)).as_posix(),
        "language": "python",
        "kernel_type": "notebook",
        "is_private": kernel.is_private,
        "enable_gpu": kernel.machine_shape is not None,
        "enable_internet": kernel.enable_internet,
        "machine_shape": kernel.machine_shape or "",
        "dataset_sources": [f"{owner}/{table.dataset.slug}", *kernel.dataset_sources],
        "kernel_sources": [f"{owner}/{kernel.slug}"] if resumed else [],
        "model_sources": list(kernel.model_sources),
    }


def dataset_metadata(table: Table, *, owner: str) -> Metadata:
    """The content of the wheels' `dataset-metadata.json`."""
    dataset = table.dataset
    return {
        "id": f"{owner}/{dataset.slug}",
        "title": dataset.title,
        "subtitle": dataset.subtitle,
        "description": dataset.description,
        "licenses": [{"name": dataset.license}],
    }


def render(root: Path, table: Table, *, owner: str, resumed: frozenset[str] = frozenset()) -> list[Path]:
    """Write the metadata of every kernel and of the dataset; what an earlier table had is removed.

    Args:
        root: the checkout.
        table: of that checkout.
        owner: Kaggle account, as in the address of its page.
        resumed: slugs of kernels that go on with the output of their latest version.
    Returns:
        The files written, all of them ignored by git.
    Raises:
        UserError: the owner is no account name, a slug is unknown, or a notebook cannot be pushed; nothing is written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", owner):
        raise UserError(f"{owner!r} is no Kaggle account: give the name in the address of its page")
    for slug in resumed:
        table.kernel(slug)
    check_notebooks(root, table.kernels)
    contents = {
        kernel_folder(root, table, kernel) / KERNEL_FILE: kernel_metadata(
            root, table, kernel, owner=owner, resumed=kernel.slug in resumed
        )
        for kernel in table.kernels
    }
    contents[root / DATASET_FOLDER / DATASET_FILE] = dataset_metadata(table, owner=owner)
    for old in set((root / TABLE_FILE.parent).rglob(KERNEL_FILE)) - set(contents):
        old.unlink()
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return list(contents)


def check_rendered(root: Path, table: Table, kernel: Kernel) -> None:
    """Refuse metadata that is not what the table says now: rendered before a change, or edited by hand.

    Raises:
        UserError: says which fields differ, or that nothing was rendered.
    """
    path = kernel_folder(root, table, kernel) / KERNEL_FILE
    if not path.is_file():
        raise UserError(f"{path} is not there: run make kaggle OWNER=name")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        owner, resumed = found["id"].partition("/")[0], found["id"] in found["kernel_sources"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): run make kaggle OWNER=name") from error
    expected = kernel_metadata(root, table, kernel, owner=owner, resumed=resumed)
    fields = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if fields:
        raise UserError(
            f"{path} is not what {TABLE_FILE} says ({', '.join(fields)}): "
            f"change the table, not the file, and run make kaggle OWNER={owner}"
        )


def check_notebooks(root: Path, kernels: Sequence[Kernel]) -> None:
    """Refuse notebooks that Kaggle would accept and then fail to run, or that carry more than their source.

    Raises:
        UserError: names every notebook and what is wrong with it.
    """
    faults = [
        f"notebooks/{kernel.notebook}: {fault}"
        for kernel in kernels
        if (fault := _notebook_fault(root / "notebooks" / kernel.notebook))
    ]
    if faults:
        raise UserError("not fit for Kaggle:\n  " + "\n  ".join(faults))


def _notebook_fault(path: Path) -> str | None:
    """What keeps a notebook from being pushed, if anything does."""
    try:
        import nbformat
    except ModuleNotFoundError as error:
        raise UserError("notebooks are checked with nbformat: pip install 'kdkit[kaggle]'") from error

    if not path.is_file():
        return "there is no such file"
    if path.stat().st_size > LARGEST_NOTEBOOK_BYTES:
        return f"{path.stat().st_size} bytes, and at most {LARGEST_NOTEBOOK_BYTES} are expected without outputs"
    try:
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nbformat.validate(notebook)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        return f"no valid notebook: {str(error).splitlines()[0]}"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        return "its kernelspec is not python3, and Kaggle runs no notebook without a kernelspec"
    if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells):
        return "it carries outputs: clear them"
    return None
