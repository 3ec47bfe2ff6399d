"""Whether two checkouts of the package give the same numbers: `python -m build_tools.same_numbers --help`."""
