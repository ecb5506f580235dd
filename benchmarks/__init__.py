"""The same work on NumPy and on PyTorch, timed in turn: ratios of pairs, not absolute times.

Read from the outside in: cli.py has the commands; each file of measure/ measures one thing, on the jobs of jobs.py;
contenders/ has the models measured, and agreement.py, which checks that they compute the same before they are timed;
timing.py has the clock; results.py the tables, plot and JSON.
"""
