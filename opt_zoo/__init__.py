"""The face of the project: the command line `opt-zoo` and the parity report. Importing it imports no framework."""
