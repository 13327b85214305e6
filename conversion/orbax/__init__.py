"""Orbax's folders, read and written through tensorstore."""
