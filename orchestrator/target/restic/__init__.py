"""The target `restic`: restic's repository format, version 2, written and read by us.

What is pure, from the inside out: crypto and compression; fields (checked JSON); envelope (a sealed document);
keys, config, pack, index_file, tree, snapshot, lock_file (what the repository consists of). blob_index finds
blobs in memory, backend/ holds files, and the shell around them is lock, writer and repository.

Source of the format: restic's design document (https://restic.readthedocs.io/en/stable/100_references.html).
"""
