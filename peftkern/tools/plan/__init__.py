"""`peftkern plan`: the memory of a training step, by counting."""
