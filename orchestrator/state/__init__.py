"""What is remembered between processes: the catalogue and who owns it."""
