"""The ops of `torch.ops.peftkern`, and the back ends that dispatch chooses from."""
