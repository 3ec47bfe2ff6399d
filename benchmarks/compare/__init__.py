"""Whether a change made something slower: `python -m benchmarks compare BASE`."""
