"""Formats of quantized weights and of configs: values, checks, (de)serialization."""
