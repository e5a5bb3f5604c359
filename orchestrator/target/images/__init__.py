"""The target `images`: one folder a snapshot, one qcow2 file a disk, usable with nothing but qemu-img."""
