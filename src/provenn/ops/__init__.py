"""Functions and kernels: `reference.py` defines each operation, `fast.py` computes it."""
