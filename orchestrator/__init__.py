"""vmfleece: backs up running QEMU virtual machines with backup fleecing."""

__version__ = "0.1.0"
