"""Clients, one family a module: each owns its socket and knows exactly how far it is."""
