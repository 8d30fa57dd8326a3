"""Golden vectors of the original MEND: reading them, and running this package on them."""
