"""The restart laboratory: put a server under load, restart it, and report every loss."""
