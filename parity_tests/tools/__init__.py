"""The commands of python -m parity_tests, and what they are made of."""
