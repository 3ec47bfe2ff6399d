"""Layer attention in a network of your own: an ELA layer after each block, one history a stage and forward pass."""

import torch
from torch import nn

import ela_kernels as ek


class Net(nn.Module):
    def __init__(self, dim: int = 32, depth: int = 9, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, dim, 3, padding=1), nn.Linear(dim, classes)
        self.blocks = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(depth))
        self.retrievals = nn.ModuleList(ek.ELA(dim, head_dim=16) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, history = self.stem(x), ek.LayerHistory()
        for block, retrieve in zip(self.blocks, self.retrievals, strict=True):
            x = retrieve((x + block(x)).relu(), history)
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
net = Net()
ebqm = ek.EBQM(net, warmup=20, interval=10, smoothing=0.9)
optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
images, labels = torch.randn(64, 1, 12, 12), torch.arange(64) % 10
images += labels.view(-1, 1, 1, 1) / 2  # something to learn: brightness goes with the class
for step in range(40):
    loss = nn.functional.cross_entropy(net(images), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # unnormed pooled queries make attention sharp
    optimizer.step()
    ebqm.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
print(ebqm.report())
