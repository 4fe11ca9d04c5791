"""Memory plan of a training step, by counting: `peftkern plan`."""
