"""`fedsim new`: packages of one's own, one module for each kind's files."""
