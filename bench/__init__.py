"""`fastdpo bench`: how fast, how frugal, how right and how robust fastdpo is, beside its peers.

Folders by subject: `heads` (the output head alone), `trainers` (whole trainers, their memory and
their waits), `convergence` (whole runs on held-out pairs), `kill` (runs that are killed), `report`
(rows of results, and every table and chart made from them). `results` holds the rows.
"""
