"""A training run: its settings, its batches, the folder that it leaves, the job itself, and the loss on a text."""
