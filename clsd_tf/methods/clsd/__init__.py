"""Click-confidence learning (CLSD, arXiv 2309.16322): confidence, AdGate, guards, monitors and ``ClsdModel``."""
