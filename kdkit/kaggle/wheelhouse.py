"""The wheels that a Kaggle session without internet installs with `pip install --no-index --no-deps`.

Since nothing is resolved there, it is checked here that the wheels fit Kaggle's Python, each other and the image.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from kdkit.errors import RunFailed, UserError
from kdkit.kaggle.kernels import DATASET_FILE
from kdkit.kaggle.table import TABLE_FILE, Table

PYTHON = (3, 12)
"""Of the Kaggle image."""
NEWEST_GLIBC = 28
"""Minor version: wheels for glibc 2.28 are what packages ship, and the image (Ubuntu 22.04) has 2.35."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(NEWEST_GLIBC, 16, -1)] + ["manylinux2014_x86_64"]
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "kdkit", "data/demo", "data/shapes")
"""What kdkit's wheel is made of."""


def build_wheelhouse(root: Path, table: Table, output: Path) -> list[Path]:
    """Fill a folder with kdkit's wheel and those of the table; the old wheels stay until all new ones are there.

    Args:
        root: the checkout.
        table: of that checkout.
        output: folder to fill; it may hold wheels and `dataset-metadata.json`, and nothing else.
    Returns:
        The wheels, sorted by name.
    Raises:
        UserError: the folder holds other files, a version is not given anywhere, or the wheels do not fit.
        RunFailed: pip failed; says on what.
    """
    foreign = [path.name for path in _entries(output) if path.suffix != ".whl" and path.name != DATASET_FILE]
    if foreign:
        raise UserError(f"{output} holds {', '.join(foreign)}, which would be uploaded too: move it, or give --output")
    pinned = pinned_versions(root / "requirements.txt")
    registry = [_with_version(pin, pinned) for pin in table.wheels.registry]
    build = [_with_version(pin, pinned) for pin in table.wheels.build]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=output.parent) as staging:
        staged = Path(staging, "new")
        staged.mkdir()
        _build_wheels(root, build, staged)
        _pip("download", "--only-binary", ":all:", *_target_options(), *registry, wheels=staged)
        faults = list(wheel_faults(staged, table.wheels.image))
        if faults:
            raise UserError("these wheels would not work on Kaggle:\n  " + "\n  ".join(faults))
        _replace(output, staged, old=Path(staging, "old"))
    return sorted(output.glob("*.whl"))


def pinned_versions(requirements: Path) -> dict[str, str]:
    """Version of each package that a requirements file pins with `==`, by canonical name."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    pins = (line.partition("==") for line in lines if "==" in line)
    return {str(canonicalize_name(name)): version for name, _, version in pins}


def wheel_faults(folder: Path, image: Mapping[str, str]) -> Iterator[str]:
    """What keeps the wheels of a folder from working together on the image, installed without their requirements.

    Args:
        folder: the wheels.
        image: versions of other packages that are there.
    Yields:
        A file that is no wheel, a wheel for another Python or platform, a requirement that nothing meets.
    """
    tags = set(_kaggle_tags())
    versions = {str(canonicalize_name(name)): version for name, version in image.items()}
    wheels = []
    for path in _entries(folder):
        try:
            name, version, _, wheel_tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            yield f"{path.name}: only wheels are shipped, since Kaggle unpacks archives"
            continue
        wheels.append(path)
        versions[name] = str(version)
        if not wheel_tags & tags:
            yield f"{path.name}: not for Python {PYTHON[0]}.{PYTHON[1]} on 64-bit Linux with glibc 2.{NEWEST_GLIBC}"
    for path in wheels:
        yield from (f"{path.name} {fault}" for fault in _unmet_requirements(path, versions))


def _unmet_requirements(wheel: Path, versions: Mapping[str, str]) -> Iterator[str]:
    """What a wheel asks for and neither the other wheels nor the image have."""
    with zipfile.ZipFile(wheel) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(file).decode("utf-8"))
    python = f"{PYTHON[0]}.{PYTHON[1]}"
    if not SpecifierSet(metadata.get("Requires-Python", "")).contains(f"{python}.0"):
        yield f"needs Python {metadata['Requires-Python']}"
    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist", [])):
        if requirement.marker and not requirement.marker.evaluate(target):
            continue
        found = versions.get(canonicalize_name(requirement.name))
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            has = f"has {found}" if found else "has none"
            yield f"needs {requirement}, and Kaggle {has}: add it to wheels in {TABLE_FILE}"


def _with_version(pin: str, pinned: Mapping[str, str]) -> str:
    """`name==version`, the version from requirements.txt where the table gives none."""
    if "==" in pin:
        return pin
    if canonicalize_name(pin) not in pinned:
        raise UserError(f"{TABLE_FILE}: {pin} has no version there and none in requirements.txt; write {pin}==VERSION")
    return f"{pin}=={pinned[canonicalize_name(pin)]}"


def _kaggle_tags() -> Iterator[Tag]:
    """What a wheel may be made for."""
    yield from cpython_tags(PYTHON, platforms=PLATFORMS)
    yield from compatible_tags(PYTHON, interpreter=f"cp{PYTHON[0]}{PYTHON[1]}", platforms=PLATFORMS)


def _target_options() -> list[str]:
    """The same for pip."""
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    return ["--implementation", "cp", "--python-version", f"{PYTHON[0]}.{PYTHON[1]}", *platforms]


def _build_wheels(root: Path, pins: Sequence[str], wheels: Path) -> None:
    """kdkit's wheel and those of `pins`; kdkit's from a copy: a stale `build/` would put deleted modules into it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in BUILD_INPUTS:
            source, copy = root / name, Path(folder) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        _pip("wheel", folder, *pins, wheels=wheels)


def _pip(command: str, *arguments: str, wheels: Path) -> None:
    """Run pip, which puts what it gets or builds into `wheels`."""
    place = "--dest" if command == "download" else "--wheel-dir"
    line = [sys.executable, "-m", "pip", command, "--no-deps", "--disable-pip-version-check", place, str(wheels)]
    done = subprocess.run([*line, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = [text for text in done.stderr.splitlines() if text.strip()][-3:]
        raise RunFailed(f"pip {command} failed, and the old wheels are untouched:\n  " + "\n  ".join(last))


def _replace(folder: Path, staged: Path, *, old: Path) -> None:
    """Put a staged folder in place of another, whose metadata it takes over."""
    if (folder / DATASET_FILE).is_file():
        shutil.copy(folder / DATASET_FILE, staged)
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)


def _entries(folder: Path) -> list[Path]:
    """Everything in a folder, sorted; nothing where there is none."""
    return sorted(folder.iterdir()) if folder.is_dir() else []
