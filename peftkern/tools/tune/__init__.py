"""Contests of layers against PEFT's own forward ahead of a training: `peftkern tune`."""
