"""Reading curvature: reports, operators, spectra."""
