"""Conversions between layouts of adapters, a module each; `run` has the way in."""
