"""Clients, one family per module: each owns its socket and knows exactly how far it has come."""
