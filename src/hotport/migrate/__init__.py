"""The options of other servers in hotport's words; no server that serves imports this room."""
