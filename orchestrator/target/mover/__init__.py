"""The worker process of a run: takes what QEMU writes over NBD, and puts it into a repository by chunks."""
