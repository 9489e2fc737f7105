"""The computations on one tile of logits, in PyTorch and on the Triton kernels: the only code that knows a device."""
