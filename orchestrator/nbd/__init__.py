"""Network Block Device, as far as we speak it: the protocol, a client, and a server."""
