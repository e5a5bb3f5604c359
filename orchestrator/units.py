"""Sizes, rates and durations as people write them, and back. Pure.

Sizes follow the IEC: `KiB`, `MiB`, `GiB`, `TiB` (and the bare letters K, M, G, T as QEMU reads them) are powers
of 1024; `KB`, `MB`, `GB`, `TB` are powers of 1000.
"""
