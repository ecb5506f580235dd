"""Texts encoded once, into folders of token ids, and windows read from them."""
