"""The command line: finds the verbs, runs one, prints tables, turns errors into exit codes.

A verb is a click command registered as an entry point, so this package imports no wing.
"""
