"""The first and the last things of a notebook: where it runs, what it lacks, how long it lasts, what it hands over.

Imports nothing that may be missing: this is what a notebook calls before anything is installed.
"""

from kdkit.session.packages import install_lacking, lacking
from kdkit.session.place import Session, begin

__all__ = ["Session", "begin", "install_lacking", "lacking"]
