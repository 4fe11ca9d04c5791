"""Measures peftkern beside the peers that a machine has; `tolerances` divides right from wrong."""
