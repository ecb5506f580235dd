"""Who is measured: the same model on every backend."""
