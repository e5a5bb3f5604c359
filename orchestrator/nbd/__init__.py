"""Network Block Device, as far as we speak it: the protocol, and a client."""
