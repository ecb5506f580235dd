"""Sharing work among cores, and managing the memory it needs."""
