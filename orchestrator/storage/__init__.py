"""Where fleecing images live."""
