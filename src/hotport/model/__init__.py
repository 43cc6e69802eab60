"""What may happen: values in, values out, no I/O."""
