"""Commands for people: they read what runs have written, or call the command line; none imports host or local."""
