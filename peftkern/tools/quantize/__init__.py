"""Quantization of a checkpoint to a 4-bit format, tensor by tensor: `peftkern quantize`."""
