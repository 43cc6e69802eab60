"""What processes say to each other: encoded and decoded here, without I/O."""
