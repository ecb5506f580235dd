"""Vocabularies in folders, and the encodings that they make."""
