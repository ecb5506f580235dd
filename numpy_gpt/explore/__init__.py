"""The page `numpy-gpt explore`: what it serves, and its HTML, CSS and JavaScript."""
