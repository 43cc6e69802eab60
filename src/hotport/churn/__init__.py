"""The restart laboratory: clients that notice everything while something restarts, and what they have seen."""
