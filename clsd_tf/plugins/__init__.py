"""What a user's own modules add: registries of names, and how the modules are loaded."""
