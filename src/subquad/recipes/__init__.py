"""Turning a pretrained model into another: one file per conversion."""
