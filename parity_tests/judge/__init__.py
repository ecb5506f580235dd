"""What the tests judge with: comparisons, budgets, cases, files, recorded passes."""
