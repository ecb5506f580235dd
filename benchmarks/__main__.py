"""python -m benchmarks"""

from benchmarks.environment import restart_if_slowed

if __name__ == "__main__":
    restart_if_slowed()
    from benchmarks.cli import main  # only now: it loads NumPy

    main(prog_name="python -m benchmarks")
