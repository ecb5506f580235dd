"""Chapter 5 of the book, replayed, and the figures that it prints."""
