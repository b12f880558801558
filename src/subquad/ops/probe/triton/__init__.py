"""The probe's GPU kernels."""
