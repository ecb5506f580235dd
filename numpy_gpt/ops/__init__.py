"""One file per operation: the formula and its derivative in the docstring, X_forward, and X_backward under it.

Every X_forward returns (output, cache); X_backward takes the gradient of the output and that cache and returns the
gradients of the inputs, in order. Operations see arrays only: no names, no configuration, no random state.
"""
