"""A training run: its settings, its batches, the folder that it leaves, and the job itself."""
