"""Loss terms: ``TERM`` of a file in this folder is one of ``--loss.terms NAME=WEIGHT``, or a list
of them."""
