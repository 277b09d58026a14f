"""Rows of results, the rules for reading them, and all pages made from them: `make readme`."""
