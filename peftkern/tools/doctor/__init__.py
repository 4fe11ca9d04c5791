"""Diagnosis of an installation, and dry runs of dispatch: `peftkern doctor`, `explain`."""
