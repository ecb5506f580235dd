"""One file per operation: the formula and its derivative in the docstring, X_forward, and X_backward under it.

numpy_gpt/plain.py has all of them as a textbook would write them. Here they are fast; each file explains how.

Every X_forward returns (output, cache). X_backward takes the output's gradient and that cache, and returns the inputs'
gradients in order. Operations see only arrays: no names, no configuration, no random state.
"""
