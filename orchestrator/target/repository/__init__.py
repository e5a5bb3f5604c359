"""Snapshots in a repository of restic's format: the contract of a target, over `restic` and `mover`."""
