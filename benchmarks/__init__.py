"""What is measured, and the demo: everything here runs on a real guest (see benchmarks/README.md)."""
