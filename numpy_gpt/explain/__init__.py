"""How any number of a pass came about: the pass as operations on named arrays, and the terms of each number."""
