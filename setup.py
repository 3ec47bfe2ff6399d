"""Builds the extension; everything else is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup

# The folder of setup.py is not on the path of an isolated build.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_tools.commands import BuildExtension, BuildPython, extensions, keep_names_of_folders

keep_names_of_folders(os.environ, sys.prefix)
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
