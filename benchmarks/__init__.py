"""The same work on NumPy and on PyTorch, timed in turn: ratios of pairs, not absolute times."""
