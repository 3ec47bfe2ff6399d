"""How `setup.py` builds the extension: options, compilers, the ninja file, and the setuptools commands."""
