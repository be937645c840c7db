"""Loss terms, one per file: a file that defines ``TERM`` is the term of ``--loss.terms NAME=WEIGHT``."""
