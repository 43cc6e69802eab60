"""The process with the stable pid: owns the listeners, starts workers, knows nothing of the application."""
