"""One file per inference-time system, for pretrained models. See :mod:`subquad.policies.base`."""
