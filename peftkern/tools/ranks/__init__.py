"""Ranks of a checkpoint's layers, chosen before training: `peftkern ranks`."""
