"""A training run: its settings, batches and folder, the training itself, and the loss on a text."""
