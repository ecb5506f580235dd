"""The same work on NumPy and on PyTorch, timed in turn: ratios of pairs, not absolute times.

Read from the outside in: cli.py has the commands; step.py, forward.py, decode.py, operations.py, scaling.py and
memory.py measure one thing each; backends.py is what they measure, on the jobs of jobs.py; agreement.py lets nobody be
timed who computes something else; timing.py holds the clock; results.py has tables, plot and JSON.
"""
