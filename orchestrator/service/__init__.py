"""The long-running parts: composition root, daemon, scheduler."""
