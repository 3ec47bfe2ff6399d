"""The README's code runs, and its equivalent forms are equivalent."""

import re
from pathlib import Path

import pytest
import torch

import ela_kernels as ek

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[-1][:40])
def test_a_block_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_eager_lines_are_equivalent_to_the_module():
    names: dict[str, type] = {}
    (block,) = (b for b in BLOCKS if "class Eager" in b)
    exec(compile(block, "README.md", "exec"), names)
    torch.manual_seed(0)
    fused = [ek.ELA(dim=32, head_dim=16, kernel_size=3) for _ in range(3)]
    x = y = torch.randn(2, 32, 6, 5)
    history, keys, values = ek.LayerHistory(), [], []
    for layer in fused:
        eager = names["Eager"](dim=32, head_dim=16)
        eager.load_state_dict(
            {k.removeprefix("attn."): v for k, v in layer.state_dict().items()}, strict=False
        )
        x, y = layer(x, history), eager(y, keys, values)
        # float32: a mean over 30 positions, dot products of 16, sums of 3; below 1e-5 relative to values near 1.
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_every_public_name_is_in_the_readme_or_its_table():
    missing = [
        n
        for n in ek.__all__
        if n not in README and not n.startswith(("_", "LayerAttentionO", "LayerAttentionW"))
    ]
    assert not missing
