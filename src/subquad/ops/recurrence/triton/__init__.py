"""The recurrence on a GPU: one family of Triton kernels with compile-time switches.

``parts`` what they share, ``prepare`` chunks before the state, ``scan`` the passes over time,
``grads`` the gradients of a chunk, ``step`` token by token, ``decode`` one token of a whole layer;
``launch`` lays out a call, ``configs`` holds block sizes, ``op`` the PyTorch operations.
"""
