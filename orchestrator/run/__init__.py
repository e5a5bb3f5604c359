"""What is done to one VM or one snapshot, step by step."""
