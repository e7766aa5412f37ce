"""`kaggle/kernels.yaml`: which notebooks go to Kaggle, on what machine, and which wheels go with them.

The rules here are those that the `kaggle` client does not check and the server answers late or not at all.
"""

import difflib
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import yaml
from packaging.utils import canonicalize_name
from pydantic import AfterValidator, Field, JsonValue, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kdkit.config.part import Part
from kdkit.errors import UserError
from kdkit.session.packages import LEFT_ALONE

TABLE_FILE = Path("kaggle", "kernels.yaml")
MACHINE_SHAPES = {
    "NvidiaTeslaT4": "GPU T4 x2, for every account",
    "NvidiaL4": "in some competitions",
    "NvidiaL4X1": "in some competitions",
    "NvidiaTeslaA100": "in some competitions",
    "NvidiaH100": "in some competitions",
    "NvidiaRtxPro6000": "in some competitions",
}
"""Accelerators that kdkit can use, from docs/kernels.md of the client, which checks none of them."""
REFUSED_SHAPES = {
    "NvidiaTeslaP100": "Kaggle retired it on 2026-09-15 and silently runs T4 x2 instead: write NvidiaTeslaT4",
    "NvidiaTeslaT4Highmem": "it is for Kaggle's own use: NvidiaTeslaT4 is T4 x2 already",
}


def slug_of(title: str) -> str:
    """The last part of the address that Kaggle makes of a title."""
    return title.lower().replace(" ", "-")


def _check_title(title: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]+([ -][A-Za-z0-9]+)*", title):
        raise ValueError("a title is words of letters and digits, or its slug would not be its words joined by dashes")
    return title


def _check_shape(shape: str) -> str:
    if shape in REFUSED_SHAPES:
        raise ValueError(REFUSED_SHAPES[shape])
    if shape not in MACHINE_SHAPES:
        near = difflib.get_close_matches(shape, MACHINE_SHAPES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"no such machine{hint}; known: {', '.join(MACHINE_SHAPES)}")
    return shape


def _check_pin(pin: str) -> str:
    name = canonicalize_name(pin.partition("==")[0])
    if name in LEFT_ALONE:
        raise ValueError(f"{name} is never shipped: {LEFT_ALONE[name]}")
    return pin


Title = Annotated[str, Field(min_length=6, max_length=50), AfterValidator(_check_title)]
Source = Annotated[str, StringConstraints(pattern=r"^[\w-]+/[\w-]+$")]
ModelSource = Annotated[str, StringConstraints(pattern=r"^[\w-]+/[\w-]+/[\w-]+/[\w.-]+/\d+$")]
Pin = Annotated[str, StringConstraints(pattern=r"^[\w-]+(==[\w.]+)?$"), AfterValidator(_check_pin)]
Subtitle = Annotated[str, Field(min_length=20, max_length=80)]


class Kernel(Part):
    """One notebook on Kaggle."""

    title: Title
    """As Kaggle shows it; the slug is made of it."""
    notebook: Annotated[str, StringConstraints(pattern=r"^[\w-]+\.ipynb$")]
    """File in `notebooks/`."""
    machine_shape: Annotated[str, AfterValidator(_check_shape)] | None
    """Accelerator; null: none."""
    enable_internet: bool
    """Off needs everything attached: the wheels, and models and rows that do not come with kdkit."""
    is_private: bool
    """Whether only its owner sees it."""
    dataset_sources: tuple[Source, ...] = ()
    """Datasets beside the wheels, as owner/slug."""
    model_sources: tuple[ModelSource, ...] = ()
    """Models, as owner/model/framework/variation/version."""

    @property
    def slug(self) -> str:
        """Last part of its address, and its folder below `kaggle/`."""
        return slug_of(self.title)


class WheelDataset(Part):
    """The dataset that holds the wheels."""

    title: Title
    """As Kaggle shows it; the slug is made of it."""
    subtitle: Subtitle
    """One line below the title."""
    license: str
    """As Kaggle names it; other: the description says."""
    description: str
    """What is in it."""

    @property
    def slug(self) -> str:
        """Last part of its address."""
        return slug_of(self.title)


class WheelList(Part):
    """What is in the wheelhouse beside kdkit, and what it stands on."""

    registry: tuple[Pin, ...]
    """Downloaded as wheels; `name==version`, or a name whose version requirements.txt has."""
    build: tuple[Pin, ...]
    """Built from source because the registry has no wheel; pure Python only."""
    image: dict[str, str]
    """Version of each package that the wheels need and the image has."""


class Table(Part):
    """All of `kaggle/kernels.yaml`, the defaults laid under each kernel."""

    kernels: Annotated[tuple[Kernel, ...], Field(min_length=1)]
    """The first is pushed from `kaggle/` itself, each other from `kaggle/<slug>/`."""
    dataset: WheelDataset
    wheels: WheelList

    @model_validator(mode="after")
    def _one_folder_each(self) -> "Table":
        counts = Counter(kernel.slug for kernel in self.kernels)
        twice = [slug for slug, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"kernels: several have the slug {', '.join(twice)}; give each its own title")
        return self

    def kernel(self, slug: str) -> Kernel:
        """The kernel of a slug.

        Raises:
            UserError: there is none; says which there are.
        """
        known = {kernel.slug: kernel for kernel in self.kernels}
        if slug not in known:
            raise UserError(f"no kernel has the slug {slug!r}; {TABLE_FILE} has {', '.join(known)}")
        return known[slug]


def checkout_folder(given: Path | None = None) -> Path:
    """The checkout whose notebooks are meant.

    Args:
        given: where it is; None: where kdkit is imported from.
    Raises:
        UserError: there is none, as where kdkit was installed from a wheel, which carries no notebooks.
    """
    root = given or Path(str(files("kdkit"))).parent
    if not (root / TABLE_FILE).is_file():
        raise UserError(
            f"`kdkit kaggle` needs a checkout of kdkit, and there is no {TABLE_FILE} in {root}: "
            "name one with `kdkit kaggle --checkout DIR`"
        )
    return root


def read_table(root: Path) -> Table:
    """The table of a checkout.

    Args:
        root: the checkout.
    Returns:
        The table, valid by itself; notebooks are checked when they are rendered.
    Raises:
        UserError: it is no YAML or a field is wrong; names every fault.
    """
    path = root / TABLE_FILE
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Table.model_validate(_with_defaults(tree))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    except ValidationError as error:
        faults = "\n  ".join(_explain(details) for details in error.errors())
        raise UserError(f"{TABLE_FILE} is not usable:\n  {faults}") from error


def _with_defaults(tree: JsonValue) -> JsonValue:
    """The tree with `defaults` under each kernel; what is not of that shape is left for the validation to name."""
    if not isinstance(tree, dict):
        return tree
    defaults, kernels = tree.get("defaults"), tree.get("kernels")
    if not isinstance(defaults, dict) or not isinstance(kernels, list):
        return tree
    merged: list[JsonValue] = [{**defaults, **kernel} if isinstance(kernel, dict) else kernel for kernel in kernels]
    return {**{key: value for key, value in tree.items() if key != "defaults"}, "kernels": merged}


def _explain(details: ErrorDetails) -> str:
    """One fault: the field, what is wrong, what was given."""
    path = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{path}: no such field"
    if details["type"] == "missing":
        return f"{path}: required, not given"
    reason = details["msg"].removeprefix("Value error, ")
    return f"{path}: {reason} (given: {details['input']!r})" if path else reason
