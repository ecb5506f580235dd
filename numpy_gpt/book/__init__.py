"""A replay of the book's chapter 5, and the figures that the chapter prints."""
