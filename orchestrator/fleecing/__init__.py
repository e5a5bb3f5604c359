"""Fleecing images, their grants, and the filters in a guest's QEMU."""
