"""LLaMA-Factory: `python -m peftkern.integrations.llamafactory` trains as its own command does.

The classic trainer takes a callback, which nothing in its YAML can name; its successor takes
kernels by name, once they are registered. See `__main__` for the one and `kernel` for the other.
"""
