"""How commands start, report, fail and are interrupted; what they load of a user's own."""
