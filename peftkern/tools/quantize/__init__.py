"""`peftkern quantize`: a checkpoint in NF4, tensor by tensor."""
