"""Layouts of preference data: told from the columns, and made into TRL's columns."""
