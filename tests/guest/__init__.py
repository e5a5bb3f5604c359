"""The test bed: a real guest that says what was done to it, and independent oracles for its data.

Nothing here imports the product. What the product claims is checked against the guest's own
words, a second monitor of its own, and copies taken from outside.
"""
