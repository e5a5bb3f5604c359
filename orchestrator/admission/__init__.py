"""Who may use how much of a storage, and when."""
