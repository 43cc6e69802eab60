"""Messages between processes: encoded and decoded here, without I/O."""
