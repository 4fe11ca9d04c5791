"""Checkpoint folders: read and checked tensor by tensor, written atomically and resumably."""
