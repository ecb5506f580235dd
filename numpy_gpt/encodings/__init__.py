"""Vocabularies in folders, and their encodings."""
