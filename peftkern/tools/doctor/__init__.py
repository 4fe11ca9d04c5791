"""`peftkern doctor`: what this machine runs, and whether it computes right."""
