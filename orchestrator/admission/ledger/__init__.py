"""Who holds which grants: the contract, and where it is kept."""
