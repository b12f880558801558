"""Parts that mixers share, each once: short convolutions, norms, gates, feature maps, rotations."""
