"""What is installed from a wheel, which no checkout shows: an editable install finds every file by itself."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_of(folder):
    modules = {path.parent.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
    return {".".join(module.parts) for module in modules}


class TestPackages:
    def test_a_wheel_carries_every_package(self):
        """kdkit.plots and kdkit.training.rollout were in no wheel: `import kdkit.report` failed wherever one was."""
        listed = set(PROJECT["tool"]["setuptools"]["packages"])
        assert {name for name in listed if "_data" not in name} == packages_of("kdkit") | {"kdkit.presets"}

    def test_a_wheel_carries_every_file_that_is_not_code(self):
        data = PROJECT["tool"]["setuptools"]["package-data"]
        files = (path for path in (ROOT / "kdkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        others = {path for path in files if path.suffix != ".py"}
        places = {name: ROOT / name.replace(".", "/") for name in data if "_data" not in name}
        carried = {file for name, place in places.items() for pattern in data[name] for file in place.glob(pattern)}
        assert not {path.name for path in others - carried} - {"README.md"}

    def test_a_wheel_carries_the_models_beside_the_demo_rows(self):
        demo, tools = ROOT / "data" / "demo", PROJECT["tool"]["setuptools"]
        folders = {f"kdkit.demo_data.{path.parent.name}" for path in demo.glob("*/*.json")}
        assert folders == {name for name in tools["packages"] if name.startswith("kdkit.demo_data.")}
        assert all(tools["package-data"][name] == ["*"] for name in folders)

    def test_a_wheel_carries_the_shapes(self):
        tools, shapes = PROJECT["tool"]["setuptools"], ROOT / "data" / "shapes"
        assert "kdkit.shape_data" in tools["packages"]
        assert tools["package-dir"]["kdkit.shape_data"] == "data/shapes"
        carried = {file for pattern in tools["package-data"]["kdkit.shape_data"] for file in shapes.glob(pattern)}
        assert carried == {file for file in shapes.rglob("*") if file.is_file()}
