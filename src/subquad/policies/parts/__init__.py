"""What several policies share: attention over chosen keys, and how keys are chosen."""
