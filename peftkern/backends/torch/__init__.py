"""Back end "torch": ops in torch's own operations, for every device that has no kernel of ours.

The reference in formula, but without float32 copies of large tensors: products run in the dtype of
the call where the adapters share it, elsewhere in float32 on a chunk of rows at a time. A family
whose reference does the same already has no file here; the reference serves it.
"""
