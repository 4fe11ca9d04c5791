"""Merging of adapters into a checkpoint, a panel of rows at a time: `peftkern merge`."""
