"""One file per trainable system: ``x [B,T,C] -> y [B,T,C]``. See :mod:`subquad.mixers.base`."""
