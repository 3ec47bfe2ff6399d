"""Speed and memory of layer attention on a GPU: `bash benchmarks/run_gpu.sh OUT_DIR`."""
