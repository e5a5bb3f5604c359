"""Everything that is said to QEMU and its tools."""
