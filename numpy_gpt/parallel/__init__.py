"""How the work is shared out among cores, and the memory that it needs."""
