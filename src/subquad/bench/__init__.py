"""Speed, quality, the comparison of mixers and its report."""
