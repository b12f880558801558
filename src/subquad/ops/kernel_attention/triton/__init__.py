"""Mixed attention's exact part as kernels; its linear part is the recurrence's."""
