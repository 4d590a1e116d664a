"""The commands of the command line: each parses its options, makes one call and prints its results."""
