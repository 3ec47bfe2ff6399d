"""Speed and memory of layer attention on this machine: `python -m benchmarks.run --quick`."""
