"""Paths, file formats, the network and standard streams, with their faults on users' machines."""
