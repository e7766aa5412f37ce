"""What kdkit needs and this Python has not: found in its own metadata, installed without what is better left alone."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from kdkit.attached import find_wheels
from kdkit.errors import UserError

LEFT_ALONE = {
    "torch": "the image's is built for its drivers and for the packages around it",
    "numpy": "compiled packages of the image are built against its own",
    "ipywidgets": "its front end is part of the image, and of the page that is open already",
}
"""What a notebook never installs, and why another version would break more than it mends."""
OLDEST_TORCHAO = Version("0.16")
"""peft refuses to work beside an older one, and transformers imports peft where it is."""

Install = Callable[[Sequence[str]], None]


def lacking(distribution: str = "kdkit") -> list[Requirement]:
    """Requirements of an installed distribution that are missing or have a version that does not fit."""
    return [needed for needed in _requirements(distribution) if not _is_met(needed)]


def install_lacking(distribution: str = "kdkit", *, install: Install | None = None) -> list[str]:
    """Install what a distribution lacks, and what that lacks in turn: from attached wheels first, then by name.

    Args:
        distribution: whose requirements; installed.
        install: takes pip's arguments for what to install; default: pip, without dependencies.
    Returns:
        What was installed, as "name version".
    Raises:
        UserError: a package that is left alone is missing or too old, or pip could not install one.
    """
    install = install or _pip_install
    installed: list[str] = []
    waiting = [distribution]
    while waiting:
        wanted = {needed.name: needed for name in waiting for needed in lacking(name)}
        _check_left_alone(wanted.values())
        if not wanted:
            break
        install([_place(needed) for needed in wanted.values()])
        importlib.invalidate_caches()
        still = [str(needed) for needed in wanted.values() if not _is_met(needed)]
        if still:
            raise UserError(
                f"{', '.join(still)} could not be installed: give a version that fits, or restart the session"
            )
        installed += [f"{name} {metadata.version(name)}" for name in wanted]
        waiting = list(wanted)
    return installed


def old_torchao() -> str | None:
    """What to do about a torchao that makes peft raise, or None."""
    torchao, peft = _version("torchao"), _version("peft")
    if torchao is None or peft is None or Version(torchao) >= OLDEST_TORCHAO:
        return None
    return (
        f"torchao {torchao} makes peft {peft} raise: "
        f'pip install --no-deps -U "torchao>={OLDEST_TORCHAO}", or pip uninstall -y torchao, then restart the session'
    )


def _requirements(distribution: str) -> Iterator[Requirement]:
    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _is_met(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_left_alone(wanted: Iterable[Requirement]) -> None:
    for needed in wanted:
        if canonicalize_name(needed.name) in LEFT_ALONE:
            raise UserError(
                f"{needed} is needed, and here it is {_version(needed.name) or 'missing'}; it is not replaced under a "
                "running session. On Kaggle choose the latest environment under Settings; elsewhere install it"
            )


def _place(needed: Requirement) -> str:
    """The newest attached wheel that fits, else the requirement, for the package index."""
    tags, fitting = set(sys_tags()), []
    for wheel in find_wheels(needed.name):
        try:
            _, version, _, built_for = parse_wheel_filename(wheel.name)
        except InvalidWheelFilename:
            continue
        if needed.specifier.contains(version) and built_for & tags:
            fitting.append((version, wheel))
    return str(max(fitting)[1]) if fitting else str(needed)


def _pip_install(places: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"pip could not install {', '.join(places)}: {reason}. Switch the internet on (on Kaggle under Settings), "
            "or attach a dataset with their wheels"
        )
