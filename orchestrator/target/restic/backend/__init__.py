"""Where a repository's files lie: base is the contract; memory, directory and objects fulfil it."""
