"""Quantization of a checkpoint to 4 bits, tensor by tensor: `peftkern quantize`."""
