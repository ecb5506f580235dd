"""The same work on NumPy and on PyTorch, timed in turn: ratios of pairs, not absolute times.

Read from the outside in: cli.py has the commands; each file of measure/ measures one thing, on the jobs of jobs.py;
contenders/ has what is measured, and agreement.py, which lets nobody be timed who computes something else; timing.py
holds the clock; results.py has tables, plot and JSON.
"""
