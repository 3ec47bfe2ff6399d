"""Compares two checkouts of the package on the CPU, bit by bit.

`python -m build_tools.same_numbers OLD NEW` runs some hundred calls of every public form in each of two folders, a
process for each, and reports every output, gradient, running statistic and refusal that differs. Both need the compiled
extension for `--backend cpp`. Strides count too: a map in another memory format is another result.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("cpp", "eager")
# The package comes from the checkout, the folder to start in; the cases come from here, whatever the checkout has.
START = (
    "import sys, ela_kernels; sys.path.insert(0, {root!r});"
    "[sys.modules.pop(n) for n in list(sys.modules) if n.split('.')[0] == 'build_tools'];"
    "from build_tools.same_numbers.worker import main; main({checkout!r}, {backend!r}, {out!r}, {names!r})"
)


def start(checkout: Path, backend: str, out: Path, names: list[str]) -> subprocess.Popen[str]:
    code = START.format(
        root=str(ROOT), checkout=str(checkout), backend=backend, out=str(out), names=names
    )
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Two processes run at a time; threads that wait by turning would take the other's core.
        "OMP_WAIT_POLICY": "passive",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=checkout,
        env=environment,
        text=True,
        stdout=(out.parent / f"{out.name}.log").open("w"),
    )


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8) if x.numel() else x.new_zeros(0, dtype=torch.uint8)


def difference(old: Any, new: Any) -> str | None:
    """What is not the same of a tensor with its strides; None if nothing is."""
    if old is None or new is None:
        return f"only in {'NEW' if old is None else 'OLD'}"
    (a, a_strides), (b, b_strides) = old, new
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} in OLD, {b.dtype} {list(b.shape)} in NEW"
    if not torch.equal(bits(a), bits(b)):
        apart = (a.double() - b.double()).abs()
        count = int((bits(a) != bits(b)).view(a.numel(), -1).any(1).sum())
        return (
            f"max abs difference {float(apart.nan_to_num(0, 0).max()):.3g}, in {count} of {a.numel()}"
            f", largest {float(a.double().abs().max()):.3g}"
        )
    if a_strides != b_strides:
        return f"strides {a_strides} in OLD, {b_strides} in NEW"
    return None


def differences(name: str, old: Any, new: Any) -> list[str]:
    """What is not the same of one case, a line each."""
    (old_tensors, old_error, notes), (new_tensors, new_error, _) = old, new
    is_refusal = name.startswith("refusal: ")
    lines = []
    if old_error != new_error:
        lines.append(f"error in OLD: {old_error}\n      error in NEW: {new_error}")
    elif old_error is not None and not is_refusal:
        lines.append(f"fails in both, so that nothing is compared: {old_error}")
    else:
        for tensor in dict.fromkeys((*old_tensors, *new_tensors)):
            found = difference(old_tensors.get(tensor), new_tensors.get(tensor))
            if found is not None:
                lines.append(f"{tensor}: {found}")
    return [f"{line}{f'  ({notes})' if i == 0 and notes else ''}" for i, line in enumerate(lines)]


def run(checkouts: list[Path], backend: str, names: list[str]) -> list[dict[str, Any]]:
    """What the cases gave in each checkout."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / n for n in ("old", "new")]
        running = [start(c, backend, out, names) for c, out in zip(checkouts, outs, strict=True)]
        codes = [process.wait() for process in running]
        for checkout, out, code in zip(checkouts, outs, codes, strict=True):
            if code:
                log = (out.parent / f"{out.name}.log").read_text().splitlines()
                raise SystemExit(
                    f"{checkout}, {backend}: ended with {code}"
                    + (f" in the case {log[-1]!r}" if log else "")
                )
        return [torch.load(out, weights_only=False) for out in outs]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.same_numbers", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--backend", choices=BACKENDS, help="one of the two; default: both")
    parser.add_argument("--cases", type=int, metavar="N", help="about N of them; default: all")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="such only")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PATTERN", help="cases that may differ"
    )
    parser.add_argument("--show", type=int, default=20, metavar="N", help="of each backend")
    options = parser.parse_args(arguments)
    checkouts = [options.old.resolve(), options.new.resolve()]
    for checkout in checkouts:
        if not (checkout / "ela_kernels" / "__init__.py").is_file():
            parser.error(f"{checkout}: no checkout of this package")
    from build_tools.same_numbers.worker import names as choose

    names, is_same, begin = choose(options.cases, options.case), True, time.perf_counter()
    if not names:
        parser.error("no case has such a name")
    for backend in (options.backend,) if options.backend else BACKENDS:
        old, new = run(checkouts, backend, names)
        found = {n: lines for n in names if (lines := differences(n, old[n], new[n]))}
        allowed = {n for n in found if any(fnmatch.fnmatchcase(n, p) for p in options.allow)}
        tensors = sum(len(case[0]) for case in old.values())
        calls = [n for n in names if n.startswith("refusal: ")]
        refused = sum(old[n][1] is not None for n in calls)
        print(
            f"{backend}: {len(names) - len(calls)} cases with {tensors} tensors and {len(calls)} bad calls ({refused} "
            "refused), "
            f"{len(found) - len(allowed)} of them differ"
            + (f", and {len(allowed)} that may" if allowed else "")
        )
        for n in sorted(found, key=lambda n: n in allowed)[: options.show]:
            print(f"  {n}{' (allowed)' if n in allowed else ''}")
            for line in found[n][:6]:
                print(f"    {line}")
            if len(found[n]) > 6:
                print(f"    and {len(found[n]) - 6} more")
        if len(found) > options.show:
            print(f"  and {len(found) - options.show} more cases")
        is_same = is_same and len(found) == len(allowed)
    print(f"{'the same' if is_same else 'NOT the same'}; {time.perf_counter() - begin:.0f} s")
    return 0 if is_same else 1


if __name__ == "__main__":
    raise SystemExit(main())
