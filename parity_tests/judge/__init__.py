"""Shared tools of the tests: comparisons, budgets, cases, files, recorded passes."""
