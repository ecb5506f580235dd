"""Paths, formats, the network and standard streams, as users' machines have them."""
