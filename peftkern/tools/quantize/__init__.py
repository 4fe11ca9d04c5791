"""Quantization of a checkpoint to NF4, tensor by tensor: `peftkern quantize`."""
