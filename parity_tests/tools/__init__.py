"""The commands of python -m parity_tests, and their parts."""
