"""The verbs of the command line: options in, one call, and a few lines for a person."""
