"""torch's CPU random streams, bit for bit."""

from numpy_gpt.random.generator import Generator

__all__ = ["Generator"]
