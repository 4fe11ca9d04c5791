"""Formats of quantized weights: values, checks, (de)serialization."""
