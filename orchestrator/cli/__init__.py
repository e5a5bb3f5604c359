"""Commands, rendering and exit codes; no logic."""
