"""The layer's short steps as Triton kernels, each read and written once."""
