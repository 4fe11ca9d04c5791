"""Checkpoints whose adapters start from their weights or from data: `peftkern init`."""
