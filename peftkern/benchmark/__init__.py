"""Alias of `peftkern.tools.bench`."""
