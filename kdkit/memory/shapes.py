"""Published models by their sizes alone: a plan of a pair that nobody has downloaded yet."""

import difflib
from importlib.resources import files
from pathlib import Path

from kdkit.errors import UserError


def shape_folder(name: str) -> Path:
    """The folder of a config.json with a published model's sizes; there are no weights and no tokenizer in it.

    It stands for `teacher.path` and `student.path` where a run is planned, not where it is made.

    Args:
        name: such as smollm-135m.
    Raises:
        UserError: there is no such shape; says which there are.
    """
    shapes = _all_shapes()
    known = sorted(folder.name for folder in shapes.iterdir() if (folder / "config.json").is_file())
    if name in known:
        return shapes / name
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.4)
    meant = f"did you mean {' or '.join(near)}? There are" if near else "there are"
    raise UserError(f"no shape is called {name!r}: {meant} {', '.join(known)}; or name any folder with a config.json")


def _all_shapes() -> Path:
    """`data/shapes` of a checkout, else the wheel's copy."""
    package = Path(str(files("kdkit")))
    checkout = package.parent / "data" / "shapes"
    return checkout if checkout.is_dir() else package / "shape_data"
