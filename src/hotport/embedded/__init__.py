"""A server inside a program's own event loop, which can start the program again and hand everything over to it."""
