"""Ranks of a model's layers, chosen before training: `peftkern ranks`."""
