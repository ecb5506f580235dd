"""One file per operation: the formula and its derivative in the docstring, X_forward, and X_backward under it.

numpy_gpt/plain.py has every one of them as a textbook would write it; here they are fast, and each file says how.

Every X_forward returns (output, cache); X_backward takes the gradient of the output and that cache and returns the
gradients of the inputs, in order. Operations see arrays only: no names, no configuration, no random state.
"""
